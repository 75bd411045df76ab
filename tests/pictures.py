"""Takes the pictures of the pack from the real front end: a template's `workflows/NAME.jpg`, a node's `web/docs/images/NODE.jpg`.

    .venv/bin/python tests/pictures.py [--only NAME ...]

Needs what the browser tests need (CONTRIBUTING.md). Templates of the demo model are run before they are shown, trainings with
few steps; templates for real checkpoints are shown with empty files in their place, so that nothing is missing.
"""

import argparse
import io
import json
import os
import tempfile
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import templates
from comfy_hosts import find_hosts
from comfy_server import Server
from front_end import ARGUMENTS, NO_BROWSER, find_chromium, open_front_end
from templates import path_of

ROOT = Path(__file__).parents[1]
TEMPLATES = {name: path_of(name) for name in templates.TEMPLATES}
IMAGES = ROOT / "web" / "docs" / "images"
WIDTH, LARGEST, MARGIN = 1730, 195_000, 24  # pixels, bytes, pixels around a graph
QUALITIES = (88, 82, 76, 70, 64, 58, 50)
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasMenu": False, "Comfy.Graph.CanvasInfo": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None", "Comfy.NodeBadge.NodeLifeCycleBadgeMode": "None",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}  # fmt: skip
LOADERS = {  # where a loader's files lie
    "CheckpointLoaderSimple": "checkpoints", "UNETLoader": "diffusion_models", "DualCLIPLoader": "text_encoders", "VAELoader": "vae",
    "SafeCFG_LoadHGR": "hgr",
}  # fmt: skip
FEW = {
    "harmful_runs": 24,
    "clean_runs": 16,
    "calibration_runs": 16,
    "condition_steps": 60,
    "guidance_steps": 60,
    "prompt_steps": 60,
}
# The box around all groups and nodes, or around one kind of node, titles included: [x, y, width, height].
BOX = """kind => {
  const nodes = app.graph._nodes.filter((node) => !kind || node.type === kind);
  const boxes = nodes.map(({ pos, size }) => [pos[0], pos[1] - 30, size[0], size[1] + 30]);
  if (!kind) boxes.push(...app.graph._groups.map((group) => [...group.pos, ...group.size]));
  const left = Math.min(...boxes.map((b) => b[0])), top = Math.min(...boxes.map((b) => b[1]));
  return [left, top, Math.max(...boxes.map((b) => b[0] + b[2])) - left, Math.max(...boxes.map((b) => b[1] + b[3])) - top];
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
FEWER = """few => {
  for (const node of app.graph._nodes)
    if (node.type.startsWith("SafeCFG_"))
      for (const widget of node.widgets ?? []) if (widget.name in few) widget.value = few[widget.name];
}"""


def runs(nodes: list[dict]) -> bool:
    """Whether a template needs nothing but the pack."""
    return any(node["type"] == "SafeCFG_DemoModel" for node in nodes)


def stand_ins(base: Path) -> None:
    """Empty files under the names that templates for real checkpoints use."""
    graphs = [json.loads(path.read_text(encoding="utf-8"))["nodes"] for path in TEMPLATES.values()]
    for node in (node for nodes in graphs if not runs(nodes) for node in nodes):
        for name in node.get("widgets_values") or [] if node["type"] in LOADERS else []:
            if str(name).endswith(".safetensors"):
                file = base / "models" / LOADERS[node["type"]] / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()


def shot(page, kind: str | None, width: int | None) -> Image.Image:
    """The graph, or its node of a kind, as the front end draws it; at most `width` pixels wide."""
    x, y, w, h = page.evaluate(BOX, kind)
    page.set_viewport_size({"width": round(w) + 2 * MARGIN, "height": round(h) + 2 * MARGIN})
    page.wait_for_timeout(500)
    page.evaluate(LOOK, [x - MARGIN, y - MARGIN])
    page.wait_for_timeout(1500)  # widgets of the page follow the canvas
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    if width and picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    return picture


def save(picture: Image.Image, path: Path) -> None:
    """As the best JPEG within LARGEST bytes."""
    for quality in QUALITIES:
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=quality, optimize=True, progressive=True)
        if data.tell() <= LARGEST:
            break
    path.write_bytes(data.getvalue())
    print(f"{path.relative_to(ROOT)}: {picture.width}x{picture.height}, {len(data.getvalue()) // 1000} kB, quality {quality}")


def template(server: Server, page, name: str) -> None:
    workflow = json.loads(TEMPLATES[name].read_text(encoding="utf-8"))
    page.set_viewport_size({"width": 1600, "height": 1000})
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_function("wanted => app.graph._nodes.length === wanted", arg=len(workflow["nodes"]))
    if runs(workflow["nodes"]):
        page.evaluate(FEWER, FEW)
        page.evaluate("() => app.queuePrompt(0, 1)")
        time.sleep(2)
        while any(server.get("/queue").values()):
            time.sleep(0.5)
        (run,) = server.get("/history?max_items=1").values()
        if run["status"]["status_str"] != "success":
            raise SystemExit(f"error: {name} did not run: {run['status']['messages'][-1]}")
        page.wait_for_timeout(2000)
    save(shot(page, None, WIDTH), TEMPLATES[name].with_suffix(".jpg"))


def node(page, kind: str) -> None:
    page.evaluate(ADD, kind)
    page.wait_for_timeout(500)
    save(shot(page, kind, None), IMAGES / f"{kind}.jpg")


def main() -> None:
    pages = [path.stem for path in sorted((ROOT / "web" / "docs").glob("*.md"))]
    nodes = [name for name in pages if not name.startswith(("SafeCFG_Enforced", "SafeCFG_Refused"))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*TEMPLATES, *nodes], default=[*TEMPLATES, *nodes], metavar="NAME")
    args = parser.parse_args()
    if (program := find_chromium()) is None:
        raise SystemExit(f"error: {NO_BROWSER}")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        server = Server(find_hosts(os.environ, Path.home())[0], Path(folder))
        try:
            stand_ins(Path(folder))
            (Path(folder) / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
            server.wait_until_ready()
            browser = driver.chromium.launch(executable_path=program, args=ARGUMENTS)
            page = browser.new_page()
            open_front_end(page, server.url)
            page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
            page.add_style_tag(content=".no-drag.fixed { display: none !important }")  # the menu button of focus mode
            for name in args.only:
                if name in TEMPLATES:
                    template(server, page, name)
                else:
                    node(page, name)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
