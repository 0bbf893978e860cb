"""Choices that command lines offer, and the check of a setting: without torch, so that --help answers at once."""

from __future__ import annotations

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "float32", "bfloat16")
SWITCHES = ("recache", "keep", "reset")  # what becomes of the KV cache when the prompt changes
MAX_SEED = 2**63 - 1  # of a command line


def require(condition: bool, key: str, found: object, expected: str) -> None:
    """Raise ValueError naming the key, what was found and what was expected, unless the condition holds."""
    if not condition:
        raise ValueError(f"{key} is {found}: expected {expected}")
