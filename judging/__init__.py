"""What a video is worth: judges, metrics, tracking, distances between distributions, the health panel, the sanity matrix.

Never trains a generator. Imports `training` and below; the scripts and `experiments` import it.
"""

from machine import threads  # noqa: F401  before torch, which reads its settings once
