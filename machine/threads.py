"""Lets OpenMP threads sleep while they wait for each other. Every script imports this before torch, whose OpenMP reads it once.

By default threads spin until the slowest arrives: if another process uses a core, a step takes several times as long. Sleeping costs a few
microseconds per parallel region. A user's setting wins.
"""

from __future__ import annotations

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ.update(GOMP_SPINCOUNT="0", KMP_BLOCKTIME="0")  # of GNU's OpenMP and of Intel's
