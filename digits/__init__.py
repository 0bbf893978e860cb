"""MNIST digits: the bundled ones, IDX files, their splits and deformations.

No motion, no captions: those are `moving_mnist`. Imports `machine` alone; may be imported by all above it.
"""
