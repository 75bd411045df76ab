"""Takes the pictures of nodes for their help pages from the real front end: `web/docs/images/NODE.jpg`.

    .venv/bin/python tests/pictures.py [--only NODE ...]

Needs what the browser tests need (CONTRIBUTING.md). What a picture shows is noted in `help_pictures.json`, so that
tests/test_thumbnails.py finds a stale one. Those of templates are made by tests/thumbnails.py.
"""

import argparse
import io
import json
import os
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from comfy_hosts import find_hosts
from comfy_server import Server
from front_end import ARGUMENTS, NO_BROWSER, find_chromium, open_front_end
from help_pictures import IMAGES, note

ROOT = Path(__file__).parents[1]
LARGEST, MARGIN = 195_000, 24  # bytes, pixels around a node
QUALITIES = (88, 82, 76, 70, 64, 58, 50)
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasMenu": False, "Comfy.Graph.CanvasInfo": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None", "Comfy.NodeBadge.NodeLifeCycleBadgeMode": "None",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}  # fmt: skip
# The box around a node, its title included: [x, y, width, height].
BOX = """kind => {
  const { pos, size } = app.graph._nodes.find((node) => node.type === kind);
  return [pos[0], pos[1] - 30, size[0], size[1] + 30];
}"""
LOOK = """([x, y]) => {
  const ds = app.canvas.ds;
  ds.scale = 1;
  ds.offset[0] = -x;
  ds.offset[1] = -y;
  app.canvas.deselectAll?.();
  app.canvas.setDirty(true, true);
}"""
ADD = """kind => {
  for (const old of [...app.graph._nodes]) app.graph.remove(old); // a new id: values are kept by id
  const node = LiteGraph.createNode(kind);
  node.pos = [100, 100];
  app.graph.add(node);
}"""


def shot(page, kind: str) -> Image.Image:
    """A node as the front end draws it."""
    x, y, w, h = page.evaluate(BOX, kind)
    page.set_viewport_size({"width": round(w) + 2 * MARGIN, "height": round(h) + 2 * MARGIN})
    page.wait_for_timeout(500)
    page.evaluate(LOOK, [x - MARGIN, y - MARGIN])
    page.wait_for_timeout(1500)  # widgets of the page follow the canvas
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def save(picture: Image.Image, path: Path) -> None:
    """As the best JPEG within LARGEST bytes."""
    for quality in QUALITIES:
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=quality, optimize=True, progressive=True)
        if data.tell() <= LARGEST:
            break
    path.write_bytes(data.getvalue())
    print(f"{path.relative_to(ROOT)}: {picture.width}x{picture.height}, {len(data.getvalue()) // 1000} kB, quality {quality}")


def node(page, kind: str) -> None:
    page.evaluate(ADD, kind)
    page.wait_for_timeout(500)
    save(shot(page, kind), IMAGES / f"{kind}.jpg")
    note(kind)


def main() -> None:
    pages = [path.stem for path in sorted((ROOT / "web" / "docs").glob("*.md"))]
    nodes = [name for name in pages if not name.startswith(("SafeCFG_Enforced", "SafeCFG_Refused"))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=nodes, default=nodes, metavar="NODE")
    args = parser.parse_args()
    if (program := find_chromium()) is None:
        raise SystemExit(f"error: {NO_BROWSER}")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        server = Server(find_hosts(os.environ, Path.home())[0], Path(folder))
        try:
            (Path(folder) / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
            server.wait_until_ready()
            browser = driver.chromium.launch(executable_path=program, args=ARGUMENTS)
            page = browser.new_page()
            open_front_end(page, server.url)
            page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
            page.add_style_tag(content=".no-drag.fixed { display: none !important }")  # the menu button of focus mode
            for name in args.only:
                node(page, name)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
