"""The house: imports go from the upper wings to the lower ones, never back up, and never in a circle."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from machine.paths import REPOSITORY as ROOT

HEART = ("tiny_causal_wan", "dynamic_video_sf", "moving_mnist")
SCRIPTS = ("train", "generate", "evaluate")
MAY_IMPORT = {  # what every wing sees of the house beside itself
    "machine": (), "digits": ("machine",), "network": ("machine",), "method": ("machine", "digits", "network"),
    "tiny_causal_wan": ("machine", "network", "method"), "moving_mnist": ("machine", "digits", "network", "method"),
    "dynamic_video_sf": ("machine", "network", "method", "tiny_causal_wan"), "clips": ("machine", "network", "method"),
}
MAY_IMPORT["training"] = ("machine", "digits", "network", "method", "clips", *HEART)
MAY_IMPORT["sampling"] = MAY_IMPORT["judging"] = (*MAY_IMPORT["training"], "training")
for name in SCRIPTS:
    MAY_IMPORT[name] = (*MAY_IMPORT["training"], "training", "sampling", "judging")
MAY_IMPORT["experiments"] = (*MAY_IMPORT["train"], *SCRIPTS)
MAY_IMPORT["demo"] = ("machine",)
MAY_IMPORT["web"] = (*MAY_IMPORT["experiments"], "experiments", "demo")
FILES = [path for pattern in ("*.py", "*/*.py") for path in sorted(ROOT.glob(pattern)) if path.parent.name not in ("tests", "outputs")]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def imported_modules(path: Path) -> set[str]:
    """Every module of the house that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path.name}:{node.lineno}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES


def wing_of(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down(path):
    wing = wing_of(module_name(path))
    up = {name for name in imported_modules(path) if wing_of(name) not in (wing, *MAY_IMPORT[wing])}
    assert not up, f"{module_name(path)} imports {sorted(up)}, which {wing} does not see"


def test_imports_form_no_circle():
    ordered = list(TopologicalSorter({module_name(path): imported_modules(path) for path in FILES}).static_order())  # raises CycleError
    assert set(ordered) == MODULES and ordered.index("machine.paths") < ordered.index("dynamic_video_sf") < ordered.index("train")


@pytest.mark.parametrize("command", [
    "generate.py", "evaluate.py",
    *("-m experiments." + name for name in ("comparison", "long_video drift", "benchmark", "spread")),
])
def test_help_answers_without_torch(command):
    """torch takes seconds to load, so every entry point reads its command line first."""
    command = [sys.executable, "-X", "importtime", *command.split(), "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "precision" in ended.stdout
    assert re.search(r"\| +machine.threads$", ended.stderr, re.MULTILINE) and not re.search(r"\| +torch$", ended.stderr, re.MULTILINE)
