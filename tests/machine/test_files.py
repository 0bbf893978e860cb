"""A file is written whole or not at all, and the earlier one stays."""

import os
from pathlib import Path

import pytest

from machine.files import replacing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "checkpoint.pt"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".pt" and not path.exists()
        temporary.write_text("earlier")
    assert path.read_text() == "earlier"
    return path


@pytest.mark.parametrize("is_durable", [False, True])
@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk full\nof torch"), ValueError("bad"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["body", "replace"])
def test_whatever_stops_a_write_leaves_the_earlier_file_and_no_other(path, monkeypatch, place, error, is_durable):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)
    is_of_the_disk = isinstance(error, OSError | RuntimeError)
    with pytest.raises(OSError if is_of_the_disk else type(error)) as caught, replacing(path, is_durable) as temporary:
        temporary.write_text("half a fi")
        if place == "body":
            raise error
    if is_of_the_disk:
        assert str(caught.value).startswith(f"cannot write {path} (disk full): the earlier file is untouched")
    assert path.read_text() == "earlier" and os.listdir(path.parent) == [path.name]


def test_a_durable_file_is_flushed_before_it_takes_the_name_and_its_folder_after(path, monkeypatch):
    order = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("flush") or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda *names: order.append("rename") or rename(*names))
    for is_durable in (True, False):
        with replacing(path, is_durable) as temporary:
            temporary.write_text("later")
    assert order == ["flush", "rename", "flush", "rename"] and path.read_text() == "later"


@pytest.mark.parametrize(("target", "words"), [
    ("folder/checkpoint.pt/x.pt", "cannot write into the folder .*checkpoint.pt .*choose another folder"),
    ("folder", "cannot write the file .*folder: a folder of that name exists"),
])
def test_what_is_in_the_way_is_named_in_one_line(path, tmp_path, target, words):
    with pytest.raises(OSError, match=words) as caught, replacing(tmp_path / target):
        raise AssertionError("no temporary file can be there")
    assert "\n" not in str(caught.value) and path.read_text() == "earlier"
