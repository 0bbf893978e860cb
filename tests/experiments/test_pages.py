"""README.md and docs/ say what results/ says, lead where they say, and show commands that exist."""

import re
from pathlib import Path

import pytest

from experiments.pages import filled, pages
from machine.paths import REPOSITORY

PAGES = [*pages(), REPOSITORY / "pretrained" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_tables_are_those_of_the_results(page: Path):
    text = page.read_text(encoding="utf-8")
    assert filled(text, REPOSITORY / "results") == text, "run python -m experiments.pages"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_pictures_exist(page: Path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_script_of_a_command_exists(page: Path):
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        scripts = re.findall(r"\bpython ([\w/]+\.py)", block)
        modules = set(re.findall(r"\bpython -m ([\w.]+)", block)) - {"venv", "pytest"}
        for path in (*scripts, *(f"{module.replace('.', '/')}.py" for module in modules)):
            assert (REPOSITORY / path).is_file(), f"{page.name} calls {path}"


def test_a_table_that_was_typed_by_hand_is_seen():
    page = REPOSITORY / "README.md"
    text = page.read_text(encoding="utf-8")
    changed = re.sub(r"\| 0\.\d+ \|", "| 9.999 |", text, count=1)
    assert changed != text and filled(changed, REPOSITORY / "results") == text
    with pytest.raises(ValueError, match="the table nothing: expected one of evaluation, "):
        filled("<!-- table: nothing -->\n<!-- end -->", REPOSITORY / "results")
