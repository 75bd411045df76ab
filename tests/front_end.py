"""Opens the real front end in a headless Chromium: for the browser tests, and for the script that takes pictures."""

import os
import shutil

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = [  # nothing is reached but this machine
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
NO_BROWSER = (
    "NO BROWSER FOUND: Chromium (or CHROMIUM=its path) and `pip install playwright` in .venv are needed to test the front end"
)
WAIT = 180_000  # milliseconds; slow CI machines
READY = "() => window.app?.graph && window.app.extensionManager && window.LiteGraph?.registered_node_types['SafeCFG_Apply']"


def find_chromium() -> str | None:
    """CHROMIUM, or the first of PROGRAMS in PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


def open_front_end(page, url: str) -> None:
    """Goes to a server's front end; returns when this pack is loaded."""
    page.set_default_timeout(WAIT)
    page.goto(url)
    page.wait_for_function(READY)
    page.wait_for_load_state("networkidle")
