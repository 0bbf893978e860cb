"""Writing files: names that are free, a folder that takes files, and replacing a file in one step."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path


def free_paths(folder: Path, names: list[str]) -> list[Path]:
    """Paths for `names` of which none exists: as they are, or all with the first free number, such as `_2`."""

    def numbered(number: int) -> list[Path]:
        tag = "" if number == 1 else f"_{number}"
        return [folder / f"{Path(name).stem}{tag}{Path(name).suffix}" for name in names]

    return next(paths for paths in map(numbered, count(1)) if not any(path.exists() for path in paths))


def require_writable(folder: Path, key: str = "output_dir") -> None:
    """Create `folder` where it is missing. Raises OSError naming it, and the key to choose another by, if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write into the folder {folder} ({error.strerror}): choose another {key}") from error


@contextmanager
def replacing(path: Path, is_durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, of the same suffix, and rename it to `path` if the body succeeds: `path` is always whole.
    is_durable: the new file survives a loss of power. Raises OSError in one line for a folder or a file that cannot be written; what was at
    `path` is then untouched."""
    if path.is_dir():
        raise OSError(f"cannot write the file {path}: a folder of that name exists; choose another file name")
    require_writable(path.parent, "folder")
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")  # `remove_leftovers` knows the name
    try:
        yield temporary
        if is_durable:
            _flush(temporary, os.O_RDWR)
        os.replace(temporary, path)
        if is_durable and os.name == "posix":  # Windows opens no folder
            _flush(path.parent, os.O_RDONLY)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        reason = str(_system_error_behind(error)).partition("\n")[0]
        raise OSError(f"cannot write {path} ({reason}): the earlier file is untouched; free some space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _system_error_behind(error: BaseException) -> BaseException:
    """The system's refusal behind an error that torch raised because of it; the error itself where there is none."""
    context = error.__context__
    return error if isinstance(error, OSError) or context is None else _system_error_behind(context)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary checkpoints of killed saves. No other process may be saving in the folder."""
    for path in folder.glob(".*.part.pt"):
        path.unlink(missing_ok=True)
