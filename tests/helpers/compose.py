"""Configurations as the command line composes them."""

from hydra import compose, initialize_config_dir

from machine.paths import CONFIGS
from training.config import Config, build_config, register_schemas

register_schemas()


def composed(*overrides: str) -> Config:
    """That of `python train.py OVERRIDES`."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return build_config(compose("train", list(overrides)))
