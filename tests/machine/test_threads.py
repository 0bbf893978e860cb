"""Threads wait asleep in every script, and a user's own setting wins."""

import ast
import os
import runpy

import pytest

from machine.paths import REPOSITORY as ROOT

SCRIPTS = [path for pattern in ("*.py", "training/*.py") for path in sorted(ROOT.glob(pattern))
           if "__main__" in path.read_text(encoding="utf-8") and path.stem != "demo"]  # which loads no torch
DOORS = [ROOT / wing / "__init__.py" for wing in ("experiments", "judging")]  # of `python -m WING.NAME`, which imports its door first


@pytest.mark.parametrize("path", [*SCRIPTS, *DOORS, ROOT / "tests" / "conftest.py"], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_script_decides_before_it_loads_torch(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    first = next(node for node in imports if not isinstance(node, ast.ImportFrom) or node.module != "__future__")
    assert isinstance(first, ast.ImportFrom) and (first.module, first.names[0].name) == ("machine", "threads")


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "1000"}, {"KMP_BLOCKTIME": "200"}])
def test_a_users_own_setting_wins(own, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(own))
    runpy.run_path(str(ROOT / "machine" / "threads.py"))
    assert os.environ == (own or {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"})
