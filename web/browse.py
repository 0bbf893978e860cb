"""The built page in headless Chromium, driven from Python: for tests and measurements."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo import make_server
from machine.paths import REPOSITORY

WEB = REPOSITORY / "web"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def served(folder: Path, is_isolated: bool = True) -> Iterator[int]:
    """The port at which a page is served, from a thread, for the time of the body."""
    with make_server(folder, 0, is_isolated) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def what_is_missing() -> str | None:
    """What must be installed or built before the page can be used here, in one line; None if nothing is missing."""
    needed = (
        (CHROMIUM, "chromium is not installed: apt-get install chromium"), (shutil.which("node"), "node is not installed"),
        ((WEB / "node_modules" / "playwright-core").is_dir(), "no web/node_modules: npm ci in the folder web"),
        ((WEB / "dist" / "index.html").is_file(), "no built page: python -m web.export, then npm run build in the folder web"),
    )
    return next((message for is_there, message in needed if not is_there), None)


def use_page(
    folder: Path, orders: list[list[Any]], query: str = "", is_isolated: bool = True, timeout: float = 120, **options: Any
) -> dict[str, Any]:
    """What the browser saw while it carried out the orders (see browser.mjs) on the page of a folder. timeout: seconds for each order.
    options: further settings of browser.mjs. Raises RuntimeError if an order fails."""
    with served(folder, is_isolated) as port, tempfile.TemporaryDirectory() as temporary:
        path, settings = Path(temporary) / "orders.json", {
            "chromium": CHROMIUM, "url": f"http://localhost:{port}/{query}", "orders": orders,
            "viewport": {"width": 1200, "height": 900}, "timeout": 1000 * timeout, **options,
        }
        path.write_text(json.dumps(settings))
        subprocess.run(["node", str(WEB / "browser.mjs"), str(path)], check=True, timeout=len(orders) * timeout + 60)
        seen = json.loads(Path(f"{path}.out").read_text())
    if "failure" in seen:
        raise RuntimeError(seen["failure"])
    return seen
