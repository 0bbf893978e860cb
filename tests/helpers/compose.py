"""Configurations as the command line composes them."""

from training.config import Config, compose_run


def composed(*overrides: str) -> Config:
    """That of `python train.py OVERRIDES`."""
    return compose_run(list(overrides))
