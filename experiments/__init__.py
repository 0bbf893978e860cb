"""Many runs or long measurements, each `python -m experiments.NAME`: comparison, long_video, benchmark, spread.

Nothing imports this wing.
"""

from machine import threads  # noqa: F401  before torch, which reads its settings once
