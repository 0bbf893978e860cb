"""The rooms: imports go down the list, never up or in a circle, and the house rules that a parser can see hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "threads", "seeds",
    "flow_matching", "attention", "batch_share", "recomputation", "int8_products", "wan_block", "kv_cache", "tiny_causal_wan",
    "text_encoder", "mnist_digits", "digit_deformation", "output_folder", "moving_mnist", "training_config", "comparison_config",
    "config", "objectives", "distribution_losses", "rollout", "dynamic_video_sf", "few_step", "runtime", "sharding", "distributed",
    "checkpoint", "resume", "interruption", "streaming", "sampling", "held_out", "video_io", "video_input", "ink", "distribution", "glyphs", "digit_judge", "tracking",
    "video_judge", "corruptions", "metrics", "digit_count", "panel", "sanity", "report", "run_log", "health", "watchdog",
    "starting_networks", "stages", "few_step_stage", "timing", "compute", "public_code", "speed", "comparison_jobs", "comparison_report", "comparison",
    "train", "generate", "evaluate", "spread", "benchmark", "long_video", "demo",
)
FILES = sorted(ROOT.glob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path.name}:{node.lineno}: a relative import"
            names.add(node.module.split(".")[0])
    return names


def definitions(file: str) -> set[str]:
    """The functions and classes that a top-level file defines, not those that it imports."""
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def test_every_top_level_file_is_a_known_room():
    unknown = {path.stem for path in FILES} - set(ROOMS)
    assert not unknown, f"give {sorted(unknown)} a place in the list of rooms, here and in the README"


def test_the_readmes_table_names_what_its_files_define():
    rows = re.findall(r"^\| `(\w+\.py)` \|(.*)\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = [(file, name) for file, text in rows for name in re.findall(r"`([A-Z]\w+)`", text)]
    assert len(named) > 5
    for file, name in named:
        assert name in definitions(file), f"README.md says that {name} lives in {file}"


def test_the_samplers_stand_where_sampling_says():
    docstring = ast.get_docstring(ast.parse((ROOT / "sampling.py").read_text(encoding="utf-8")))
    (room,) = re.findall(r"themselves\s+stand\s+in\s+`(\w+)`", docstring)
    assert {"rollout_blocks", "sample_bidirectional"} <= definitions(f"{room}.py"), room


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_go_down_the_list(path):
    rooms_above = set(ROOMS[: ROOMS.index(path.stem)])
    own = imported_modules(path) & set(ROOMS)
    assert own <= rooms_above, f"{path.name} imports {sorted(own - rooms_above)}, which stand at or below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_attribute_is_guessed_and_no_error_swallowed(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            assert node.id not in ("getattr", "hasattr", "setattr"), f"{path.name}:{node.lineno}: {node.id}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: a bare except"
