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

    for number in count(1):
        tag = "" if number == 1 else f"_{number}"
        paths = [folder / f"{Path(name).stem}{tag}{Path(name).suffix}" for name in names]
        if not any(path.exists() for path in paths):
            return paths


def require_writable(folder: Path, key: str = "output_dir") -> None:
    """Create `folder` if it is missing. Raises OSError naming it, and the key that chooses it, if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write into the folder {folder} ({error.strerror}): choose another {key}") from error


@contextmanager
def replacing(path: Path, is_durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, of the same suffix, and rename it to `path` if the body succeeds: `path` is always whole.
    is_durable: the new file survives a loss of power. Raises OSError in one line if it cannot be written; `path` is then untouched."""
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
        cause: BaseException = error
        while not isinstance(cause, OSError) and cause.__context__ is not None:
            cause = cause.__context__
        reason = str(cause).partition("\n")[0]
        raise OSError(f"cannot write {path} ({reason}): the earlier file is untouched; free some space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary checkpoints of killed saves. No other process may be saving in the folder."""
    for path in folder.glob(".*.part.pt"):
        path.unlink(missing_ok=True)
