"""From an empty ComfyUI to the first pictures, by clicks in its real front end: how many, and how many seconds.

    .venv/bin/python tests/clicks.py quickstart
    .venv/bin/python tests/clicks.py protect [--side 256] [--steps 2]

`quickstart`: the four pictures of template 01. `protect`: a Stable Diffusion 1.5 checkpoint of full size and random weights under a
user's own name, and no HGR for it: template 02 makes one of its text encoder (minutes), then draws. What is typed into fields to
make the picture small enough for a CPU is no click of a user, and is not counted. Needs what the browser tests need.
"""

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from comfy_hosts import find_hosts
from comfy_server import Server
from front_end import ARGUMENTS, find_chromium, open_front_end

ROOT = Path(__file__).parents[1]
THEIRS = "my_model.safetensors"
CARDS = {"quickstart": "01 Quickstart", "protect": "02 Protect any checkpoint"}
ESTIMATE = "takes about"
SMALL = """([side, steps]) => {
  for (const node of app.graph._nodes) for (const widget of node.widgets ?? []) {
    if (["width", "height"].includes(widget.name)) widget.value = side;
    if (widget.name === "steps") widget.value = steps;
  }
}"""
# Where a click on a combo of the classic front end lands: [x, y] of the page.
COMBO = """([type, name]) => {
  const node = app.graph._nodes.find((each) => each.type === type), widget = node.widgets.find((each) => each.name === name);
  const { scale, offset } = app.canvas.ds, { left, top } = app.canvas.canvas.getBoundingClientRect();
  return [left + (node.pos[0] + node.size[0] / 2 + offset[0]) * scale, top + (node.pos[1] + widget.last_y + 10 + offset[1]) * scale];
}"""


class Clicks:
    """Clicks as a user, and counts."""

    def __init__(self, page: Page):
        self.page, self.count, self.started = page, 0, time.monotonic()

    def on(self, what: str, locator) -> None:
        locator.first.wait_for()
        locator.first.click()
        self._note(what)

    def at(self, what: str, x: float, y: float) -> None:
        self.page.mouse.click(x, y)
        self._note(what)

    def _note(self, what: str) -> None:
        self.count += 1
        print(f"{self.seconds:6.1f} s  click {self.count}: {what}", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def open_template(clicks: Clicks, card: str) -> None:
    """The template browser; the pack in its list; the card."""
    page = clicks.page
    if not page.get_by_test_id("template-workflows-content").is_visible():
        clicks.on("Templates", page.get_by_role("button", name="Templates"))
    clicks.on("safecfg, in the list on the left", page.get_by_text("safecfg", exact=True))
    clicks.on(card, page.get_by_test_id(f"template-workflow-{card}"))
    page.wait_for_function("() => app.graph._nodes.some((node) => node.type.startsWith('SafeCFG_'))")


def choose_checkpoint(clicks: Clicks, name: str) -> None:
    """A click on the loader's field, one on the file."""
    page = clicks.page
    page.wait_for_timeout(1000)
    clicks.at("the checkpoint's field", *page.evaluate(COMBO, ["CheckpointLoaderSimple", "ckpt_name"]))
    clicks.on(name, page.get_by_text(name, exact=True))


def run(clicks: Clicks, server: Server, only_estimate: bool) -> None:
    """Run; until the server has finished what was queued, or, with `only_estimate`, has said how long it will take."""
    clicks.on("Run", clicks.page.get_by_test_id("queue-button"))
    while not server.get("/history"):
        time.sleep(0.2)
        if only_estimate and (said := [line for line in server.log().splitlines() if ESTIMATE in line]):
            print(f"{clicks.seconds:6.1f} s  {said[-1]}", flush=True)
            return
    (entry,) = server.get("/history").values()
    if entry["status"]["status_str"] != "success":
        raise SystemExit(f"error: {entry['status']['messages'][-1]}")
    pictures = sum(len(output.get("images", ())) for output in entry["outputs"].values())
    print(f"{clicks.seconds:6.1f} s  {pictures} pictures", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CARDS)
    parser.add_argument("--side", type=int, default=256, help="of the picture of `protect`, in pixels (256)")
    parser.add_argument("--steps", type=int, default=2, help="of `protect` (2)")
    parser.add_argument(
        "--only-estimate", action="store_true", help="`protect`: end when the node has said how long it will take"
    )
    args = parser.parse_args()
    host = find_hosts(os.environ, Path.home())[0]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        base = Path(folder)
        if args.what == "protect":
            command = [str(host.python), "-m", "benchmarks.random_checkpoints", "--comfyui", str(host.path), "--family", "sd15"]
            subprocess.run([*command, "--models", str(base / "models")], check=True, cwd=ROOT)
            (made,) = (base / "models" / "checkpoints").iterdir()
            made.rename(made.with_name(THEIRS))
        began = time.monotonic()
        server = Server(host, base)
        try:
            (base / "user" / "default" / "comfy.settings.json").write_text("{}", encoding="utf-8")  # as on the first start
            server.wait_until_ready()
            page = driver.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS).new_page(
                viewport={"width": 1600, "height": 900}
            )
            open_front_end(page, server.url)
            print(f"{host.name}: {time.monotonic() - began:.1f} s from starting it until the page is there", flush=True)
            page.wait_for_timeout(2000)
            clicks = Clicks(page)
            open_template(clicks, CARDS[args.what])
            if args.what == "protect":
                choose_checkpoint(clicks, THEIRS)
                page.evaluate(SMALL, [args.side, args.steps])
            run(clicks, server, args.only_estimate)
            for path in sorted((base / "models" / "hgr").glob("*")):
                print(f"made: {path.name}, {path.stat().st_size / 2**20:.1f} MB")
            print(f"{clicks.count} clicks, {clicks.seconds:.0f} s")
        except Exception:
            page.screenshot(path=os.environ.get("SHOT", str(base / "clicks.png")))
            raise
        finally:
            server.stop()


if __name__ == "__main__":
    main()
