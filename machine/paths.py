"""Where the repository's own files are."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs"
PRETRAINED = REPOSITORY / "pretrained"
