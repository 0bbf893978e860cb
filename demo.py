"""The page that streams: `python demo.py` serves it on this machine and opens it in a browser.

Node builds the page, once: `python -m web.export`, then `npm ci && npm run build` in the folder web. `--page FILE.zip` serves an archive of
`python -m web.archive`, without node. The server is the standard library's, with the two headers that a page needs for threads.
"""

from __future__ import annotations

import argparse
import errno
import http.server
import mimetypes
import sys
import tempfile
import threading
import webbrowser
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from machine.interruption import EXIT_CTRL_C
from machine.paths import REPOSITORY, user_path

BUILT = REPOSITORY / "web" / "dist"
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}  # give SharedArrayBuffer
TYPES = {".wasm": "application/wasm", ".mjs": "text/javascript", ".js": "text/javascript"}  # the system's table may lack or misname them


class PageHandler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, sent as their compressed copies (FILE.gz) to a browser that accepts these."""

    protocol_version = "HTTP/1.1"
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, **TYPES}

    def __init__(self, *arguments: object, is_isolated: bool = True, **options: object):
        self.is_isolated, self._is_compressed = is_isolated, False
        super().__init__(*arguments, **options)

    def translate_path(self, path: str) -> str:
        self._is_compressed, found = False, super().translate_path(path)
        takes_gzip = "gzip" in self.headers.get("Accept-Encoding", "")
        if takes_gzip and Path(found).is_dir():
            found = str(Path(found) / "index.html")
        if takes_gzip and Path(f"{found}.gz").is_file():
            self._is_compressed = True
            return f"{found}.gz"
        return found

    def guess_type(self, path: str) -> str:
        plain = Path(path).with_suffix("") if self._is_compressed else Path(path)
        return TYPES.get(plain.suffix) or mimetypes.guess_type(plain.name)[0] or "application/octet-stream"

    def end_headers(self) -> None:
        if self._is_compressed:
            self.send_header("Content-Encoding", "gzip")
        for name, value in ISOLATION.items() if self.is_isolated else ():
            self.send_header(name, value)
        self.send_header("Vary", "Accept-Encoding")
        self.send_header("Cache-Control", "no-cache")  # ask each time: the page may have been built again
        super().end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


def require_page(page: Path) -> None:
    """Raise FileNotFoundError for a folder without a built page."""
    if not (page / "index.html").is_file():
        raise FileNotFoundError(
            f"no page in {page}: build it with `pip install -r web/requirements.txt && python -m web.export && cd web && npm ci && "
            "npm run build` (node 20.19 or newer), or give an archive that `python -m web.archive` wrote elsewhere by --page FILE.zip"
        )


@contextmanager
def unpacked(page: Path) -> Iterator[Path]:
    """The folder of a built page; an archive is unpacked for the time of the body. Raises OSError if there is no page, or for a damaged
    archive."""
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        if page.is_file():
            try:
                with zipfile.ZipFile(page) as archive:
                    archive.extractall(folder)
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: encrypted, or of an unknown compression
                raise OSError(f"{page} is no whole zip archive ({error}): expected one that `python -m web.archive` wrote") from error
            page = Path(folder)
        require_page(page)
        yield page


def make_server(folder: Path, port: int, is_isolated: bool = True) -> http.server.ThreadingHTTPServer:
    """A server of a built page, for this machine; port 0 for any free one. is_isolated: with the headers for threads. Raises OSError or
    OverflowError for a port that is taken or not a port."""
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), partial(PageHandler, directory=str(folder), is_isolated=is_isolated))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve the page that streams, and open it in a browser.", allow_abbrev=False)
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one; default: 8000")
    parser.add_argument("--page", type=user_path, default=BUILT, help="a built page: a folder or a zip archive; default: web/dist")
    parser.add_argument("--no_browser", action="store_true", help="serve only")
    parser.add_argument("--no_threads", action="store_true", help="without the headers that threads need, as many static hosts serve it")
    arguments = parser.parse_args(argv)
    try:
        with unpacked(arguments.page) as folder:
            serve(folder, arguments.port, not arguments.no_threads, not arguments.no_browser)
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(EXIT_CTRL_C)


def serve(folder: Path, port: int, is_isolated: bool, opens_browser: bool) -> None:
    """Serve a built page until Ctrl-C. Raises OSError if the port cannot be used."""
    try:
        server = make_server(folder, port, is_isolated)
    except (OSError, OverflowError) as error:
        reason = "in use" if isinstance(error, OSError) and error.errno == errno.EADDRINUSE else error
        raise OSError(f"cannot serve on port {port} ({reason}): give another one by --port, 0 for any free one") from error
    with server:
        address = f"http://localhost:{server.server_address[1]}/"
        print(f"{address}  (Ctrl-C stops)", flush=True)
        if opens_browser:
            threading.Timer(0.2, webbrowser.open, (address,)).start()
        server.serve_forever()


if __name__ == "__main__":
    main()
