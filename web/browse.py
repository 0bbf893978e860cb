"""The built page in headless Chromium, driven from Python: for tests and measurements."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

from demo import make_server
from machine.paths import REPOSITORY

WEB = REPOSITORY / "web"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def what_is_missing() -> str | None:
    """What must be installed or built before the page can be used here, in one line; None for nothing."""
    for is_there, name in (
        (CHROMIUM, "chromium is not installed: apt-get install chromium"), (shutil.which("node"), "node is not installed"),
        ((WEB / "node_modules" / "playwright-core").is_dir(), "no web/node_modules: npm ci in the folder web"),
        ((WEB / "dist" / "index.html").is_file(), "no built page: python -m web.export, then npm run build in the folder web"),
    ):
        if not is_there:
            return name
    return None


def use_page(
    folder: Path, orders: list[list[Any]], query: str = "", is_isolated: bool = True, timeout: float = 120, **options: Any
) -> dict[str, Any]:
    """What the browser saw while it carried out the orders (see browser.mjs) on the page of a folder. timeout: seconds for any one thing to
    happen. options: more of what browser.mjs reads. Raises RuntimeError where an order fails."""
    server = make_server(folder, 0, is_isolated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        whole = {
            "chromium": CHROMIUM, "url": f"http://localhost:{server.server_address[1]}/{query}", "orders": orders,
            "viewport": {"width": 1200, "height": 900}, "timeout": 1000 * timeout, **options,
        }
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "orders.json"
            path.write_text(json.dumps(whole))
            subprocess.run(["node", str(WEB / "browser.mjs"), str(path)], check=True, timeout=len(orders) * timeout + 60)
            seen = json.loads(Path(f"{path}.out").read_text())
    finally:
        server.shutdown()
        server.server_close()
    if "failure" in seen:
        raise RuntimeError(seen["failure"])
    return seen
