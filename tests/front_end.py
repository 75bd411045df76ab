"""Opens the real front end in a headless Chromium: for the browser tests, and for the script that takes pictures."""

import json
import os
import shutil
import urllib.request

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
MADE = "async () => (await app.graphToPrompt()).output"
# Connects the blueprint to the Quickstart's nodes, and sets two of its outer widgets.
CONNECT = """() => {
  const find = (type) => app.graph._nodes.find((node) => node.type === type), safe = app.graph._nodes.find((node) => node.subgraph);
  const text = (title) => app.graph._nodes.find((node) => node.title === title);
  for (const slot of [0, 1]) find("SafeCFG_DemoModel").connect(slot, safe, slot);
  text("Harmful prompt").connect(0, safe, 2);
  text("Negative prompt").connect(0, safe, 3);
  find("EmptyLatentImage").connect(0, safe, 4);
  safe.connect(0, find("VAEDecode"), 0);
  for (const [name, value] of [["steps", 3], ["cfg", 5]]) safe.widgets.find((widget) => widget.name === name).value = value;
}"""


def find_chromium() -> str | None:
    """CHROMIUM, or the first of PROGRAMS in PATH."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


def open_front_end(page, url: str) -> None:
    """Goes to a server's front end; returns when this pack is loaded."""
    page.set_default_timeout(WAIT)
    page.goto(url)
    page.wait_for_function(READY)
    page.wait_for_load_state("networkidle")


def use_nodes_2(url: str, on: bool) -> None:
    """Chooses the front end for pages that are opened from now on: Nodes 2.0, or the classic canvas. Older hosts have one alone."""
    body = json.dumps({"Comfy.VueNodes.Enabled": on, "Comfy.TutorialCompleted": True}).encode()
    request = urllib.request.Request(f"{url}/settings", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).close()
