"""What a video is worth: judges, metrics, tracking, distances between distributions, the health panel, the sanity matrix.

Never trains a generator. Imports `training` and below; the scripts and `experiments` import it.
"""
