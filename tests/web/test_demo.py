"""`python demo.py`: the headers that threads need, compressed copies, archives of the page, and one line where there is no page."""

from __future__ import annotations

import gzip
import http.client
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import ISOLATION, main, make_server, unpacked
from web.archive import main as archive_main
from web.archive import write_archive


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "index.html.gz").write_bytes(gzip.compress(b"<p>page</p>"))
    (tmp_path / "runtime.wasm").write_bytes(b"\0asm")
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    return tmp_path


@pytest.fixture(params=[True, False], ids=["isolated", "plain"])
def served(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[http.client.HTTPConnection, bool]]:
    server = make_server(folder, 0, request.param)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10), request.param
    server.shutdown()
    server.server_close()


def test_every_answer_isolates_the_page(served: tuple[http.client.HTTPConnection, bool]):
    connection, is_isolated = served
    for path in ("/", "/runtime.wasm", "/weights.bin", "/nothing"):
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        assert {name: answer.headers[name] for name in ISOLATION} == (ISOLATION if is_isolated else dict.fromkeys(ISOLATION)), path
        assert answer.status == (404 if path == "/nothing" else 200)


@pytest.mark.parametrize("path", ["/", "/index.html"])
def test_a_compressed_copy_goes_to_who_takes_it(served: tuple[http.client.HTTPConnection, bool], path: str):
    connection, _ = served
    bodies = {}
    for accepted in ("gzip, br", "identity"):
        connection.request("GET", path, headers={"Accept-Encoding": accepted})
        answer = connection.getresponse()
        bodies[answer.headers["Content-Encoding"]] = answer.read()
        assert answer.headers["Content-Type"] == "text/html"
    assert gzip.decompress(bodies["gzip"]) == bodies[None] == b"<p>page</p>"


def test_wasm_is_named_as_such_whatever_the_system_knows(served: tuple[http.client.HTTPConnection, bool]):
    connection, _ = served
    connection.request("GET", "/runtime.wasm")
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "application/wasm" and answer.read() == b"\0asm"


def test_an_archive_holds_the_page_and_is_served_without_node(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    (folder / "networks").mkdir()
    (folder / "networks" / "weights.bin").write_bytes(bytes(range(256)))
    first, second = (tmp_path_factory.mktemp("archives") / name for name in ("first.zip", "second.zip"))
    for path in (first, second):
        archive_main(["--page", str(folder), "--output", str(path)])
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == ["LICENSE.txt", "index.html", "networks/weights.bin", "runtime.wasm", "weights.bin"]
    with unpacked(first) as page, make_server(page, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
        for path, content in (("/", b"<p>page</p>"), ("/networks/weights.bin", bytes(range(256)))):
            connection.request("GET", path, headers={"Accept-Encoding": "gzip"})
            assert connection.getresponse().read() == content
        server.shutdown()
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
    server = make_server(folder, 0)
    port = server.server_address[1]
    with pytest.raises(SystemExit, match=f"error: cannot serve on port {port} \\(in use\\)"):
        main(["--page", str(folder), "--no_browser", "--port", str(port)])
    server.server_close()
