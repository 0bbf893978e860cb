"""Where a call may write: names that are free, and a folder that takes files."""

from __future__ import annotations

import tempfile
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
