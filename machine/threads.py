"""Lets OpenMP threads sleep while they wait for each other. Every script imports this before torch, whose OpenMP reads it once.

By default threads spin until the slowest arrives: if another process uses a core, a step takes several times as long. Sleeping costs a few
microseconds per parallel region. A user's setting wins.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_asleep(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP threads sleep while they wait (GNU's library and Intel's), unless one of `WAIT_SETTINGS` says how already."""
    if not any(name in environment for name in WAIT_SETTINGS):
        environment.update(GOMP_SPINCOUNT="0", KMP_BLOCKTIME="0")


wait_asleep(os.environ)
