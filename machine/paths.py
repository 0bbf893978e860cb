"""Where the repository's own files are."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs"
PRETRAINED = REPOSITORY / "pretrained"


def at_home(path: str) -> str:
    """A path with a leading ~ replaced by the home folder: shells do not expand it inside `key=value`."""
    return os.path.expanduser(path)


def user_path(text: str) -> Path:
    """The type of a path on the command line."""
    return Path(at_home(text))
