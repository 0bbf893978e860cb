"""`python demo.py`: the headers that threads need, compressed copies, archives of the page, and bad input in one line."""

from __future__ import annotations

import gzip
import http.client
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import ISOLATION, main, make_server, unpacked
from web.archive import main as archive_main
from web.archive import write_archive
from web.browse import served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "index.html.gz").write_bytes(gzip.compress(b"<p>page</p>"))
    (tmp_path / "runtime.wasm").write_bytes(b"\0asm")
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    return tmp_path


def get(port: int, path: str, accepted: str = "identity") -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Accept-Encoding": accepted})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


@pytest.fixture
def port(folder: Path) -> Iterator[int]:
    with served(folder) as port:
        yield port


@pytest.mark.parametrize("is_isolated", [True, False])
def test_every_answer_isolates_the_page(folder: Path, is_isolated: bool):
    with served(folder, is_isolated) as port:
        for path, expected in (("/", 200), ("/runtime.wasm", 200), ("/weights.bin", 200), ("/nothing", 404)):
            status, headers, _ = get(port, path)
            assert {name: headers[name] for name in ISOLATION} == (ISOLATION if is_isolated else dict.fromkeys(ISOLATION)), path
            assert status == expected


@pytest.mark.parametrize("path", ["/", "/index.html"])
def test_a_compressed_copy_goes_to_who_takes_it(port: int, path: str):
    (_, zipped_headers, zipped), (_, headers, plain) = (get(port, path, accepted) for accepted in ("gzip, br", "identity"))
    assert (zipped_headers["Content-Encoding"], headers["Content-Encoding"]) == ("gzip", None)
    assert zipped_headers["Content-Type"] == headers["Content-Type"] == "text/html"
    assert gzip.decompress(zipped) == plain == b"<p>page</p>"


def test_wasm_is_named_as_such_whatever_the_system_knows(port: int):
    _, headers, body = get(port, "/runtime.wasm")
    assert headers["Content-Type"] == "application/wasm" and body == b"\0asm"


def test_an_archive_holds_the_page_and_is_served_without_node(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    (folder / "networks").mkdir()
    (folder / "networks" / "weights.bin").write_bytes(bytes(range(256)))
    first, second = (tmp_path_factory.mktemp("archives") / name for name in ("first.zip", "second.zip"))
    for path in (first, second):
        archive_main(["--page", str(folder), "--output", str(path)])
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == ["LICENSE.txt", "index.html", "networks/weights.bin", "runtime.wasm", "weights.bin"]
    with unpacked(first) as page, served(page) as port:
        assert get(port, "/", "gzip")[2] == b"<p>page</p>" and get(port, "/networks/weights.bin", "gzip")[2] == bytes(range(256))
    assert not page.exists()


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"index.html") + 15] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "words"), [
    (change_a_byte, "is no whole zip archive"), (lambda path: path.write_text("no archive"), "is no whole zip archive"),
    (lambda path: zipfile.ZipFile(path, "w").close(), "no page in .*: build it"),
])
def test_a_file_that_is_no_page_ends_in_one_line(folder: Path, damage, words: str):
    path = folder / "page.zip"
    write_archive(folder, path)
    damage(path)
    with pytest.raises(SystemExit, match=f"^error: .*{words}.*$"):
        main(["--page", str(path), "--no_browser"])


def test_no_page_ends_in_one_line_that_says_how_to_build_it(tmp_path: Path):
    with pytest.raises(SystemExit, match="error: no page in .*npm ci && npm run build.*--page FILE.zip"):
        main(["--page", str(tmp_path), "--no_browser"])


def test_a_taken_port_ends_in_one_line(folder: Path):
    with make_server(folder, 0) as server:
        port = server.server_address[1]
        with pytest.raises(SystemExit, match=f"error: cannot serve on port {port} \\(in use\\)"):
            main(["--page", str(folder), "--no_browser", "--port", str(port)])
