"""Entry points that Hydra configures, their help and their refusals: without torch, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from machine.paths import CONFIGS


def answer_help(name: str, about: str | None, schema: type) -> None:
    """Where --help is asked for, print what the script is and every key with its default, and exit: Hydra's own help takes seconds. name:
    of the file in configs/ that deviates from `schema`."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        deviations = {key: value for key, value in OmegaConf.load(CONFIGS / f"{name}.yaml").items() if key not in ("defaults", "hydra")}
        print(f"{about}\nKEY=VALUE sets one of these; --hydra-help shows Hydra's own options.\n")
        print(OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.structured(schema), deviations)))
        sys.exit()


def run_in_one_line(main: Callable[[], None], schema: type) -> None:
    """Run a Hydra entry point whose configuration has the fields of `schema`; exits with one line where Hydra refuses."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its refusals, instead of printing a page and exiting
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        from training.config import explain_refusal  # loads torch

        sys.exit(f"error: {explain_refusal(error, [field.name for field in fields(schema)])}")
