"""Lays out templates so that they can be read as they open: `.venv/bin/python tests/lay_out.py [--only TITLE ...]`.

What a file says of groups, columns (nodes of a group with nearly the same x), widths and order is kept; heights are measured in
both front ends, and everything is placed anew: the note on top over the full width, groups from left to right below it. Pictures
and texts keep a height of their own that is larger than they need. `tests/server/test_legibility.py` checks the result.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from comfy_hosts import find_hosts
from comfy_server import Server
from front_end import ARGUMENTS, find_chromium, open_front_end, use_nodes_2
from templates import TEMPLATES, path_of, read

TITLE, GAP, PAD, GROUP_TITLE, BETWEEN, SLACK = 30, 18, 12, 28, 24, 100  # pixels of the graph; SLACK: of x within a column
LEFT, TOP = 40, 60
STRETCH = {
    "PreviewImage",
    "SaveImage",
    "PreviewAny",
    "CLIPTextEncode",
    "PrimitiveStringMultiline",
    "SafeCFG_PromptBatch",
    "SafeCFG_Report",
    "SafeCFG_DetectHarm",
    "SafeCFG_LoadHGR",  # says what it loaded
    "SafeCFG_Protect",  # says how long it takes
}
NOTE = "MarkdownNote"
METERS, MADE_CATEGORIES, DEMO_CATEGORIES = ("SafeCFG_Apply", "SafeCFG_Protect"), 7, 3  # a meter grows below these
# Of every node as drawn: [id, height without its title].
HEIGHTS = """() => app.graph._nodes.map((node) => {
  const element = document.querySelector(`[data-node-id="${node.id}"]`), scale = app.canvas.ds.scale;
  const boxes = element ? [element, ...element.querySelectorAll("*")].map((each) => each.getBoundingClientRect()) : [];
  const seen = boxes.filter((box) => box.width && box.height).map((box) => box.bottom);
  const drawn = element ? (Math.max(...seen) - element.getBoundingClientRect().top) / scale - 30 : 0;
  return [String(node.id), Math.ceil(Math.max(node.computeSize()[1], node.flags.collapsed ? 0 : drawn))];
})"""


def columns(workflow: dict) -> list[tuple[dict, list[list[dict]]]]:
    """The groups from left to right, each with its columns of nodes from top to bottom."""
    found = []
    for group in sorted(workflow["groups"], key=lambda g: g["bounding"][0]):
        inside = [node for node in workflow["nodes"] if node["type"] != NOTE and is_inside(node, group)]
        stacks: list[list[dict]] = []
        for node in sorted(inside, key=lambda n: n["pos"][0]):
            if stacks and node["pos"][0] - stacks[-1][0]["pos"][0] < SLACK:
                stacks[-1].append(node)
            else:
                stacks.append([node])
        found.append((group, [sorted(stack, key=lambda n: n["pos"][1]) for stack in stacks]))
    return found


def is_inside(node: dict, group: dict) -> bool:
    (x, y), (left, top, width, height) = node["pos"], group["bounding"]
    return left <= x <= left + width and top <= y <= top + height


def place(workflow: dict, heights: dict[str, int]) -> None:
    """Writes positions and sizes: note, groups, nodes."""
    groups = columns(workflow)
    if lost := {n["id"] for n in workflow["nodes"] if n["type"] != NOTE} - {n["id"] for _, c in groups for s in c for n in s}:
        raise SystemExit(f"error: nodes {sorted(lost)} are in no group")
    (note,) = (node for node in workflow["nodes"] if node["type"] == NOTE)
    note["size"] = [width_of(groups) - 2 * BETWEEN, heights.get(str(note["id"]), 100)]
    note["pos"] = [LEFT, TOP]
    x, top, bottoms = LEFT - PAD, TOP + note["size"][1] + GAP + TITLE, []
    for group, stacks in groups:
        left, x = x, x + PAD
        for stack in stacks:
            bottoms.append(place_stack(stack, x, top + GROUP_TITLE + TITLE + 6, heights) + meter_height(stack[-1], workflow))
            x += max(node["size"][0] for node in stack) + PAD
        group["bounding"], x = [left, top, x - left, 0], x + BETWEEN
    for group, _ in groups:
        group["bounding"][3] = max(bottoms) + PAD + 6 - top
    workflow["extra"] = {k: v for k, v in workflow.get("extra", {}).items() if k != "ds"}


def meter_height(node: dict, workflow: dict) -> int:
    """Pixels that the meter of a node will take (web/js/meter.js): two lines for each sampler, a row for each category."""
    if node["type"] not in METERS:
        return 0
    samplers = sum(len(output.get("links") or ()) for output in node["outputs"])
    demo = any(each["type"] == "SafeCFG_DemoModel" for each in workflow["nodes"])
    return 36 * samplers + 20 * (DEMO_CATEGORIES if demo else MADE_CATEGORIES) + 26


def width_of(groups: list) -> float:
    inner = sum(max(n["size"][0] for n in stack) + PAD for _, stacks in groups for stack in stacks)
    return inner + len(groups) * (PAD + BETWEEN)


def place_stack(stack: list[dict], x: float, y: float, heights: dict[str, int]) -> float:
    """From top to bottom; returns where the last node ends."""
    for node in stack:
        folded = node.get("flags", {}).get("collapsed")
        need = heights.get(str(node["id"]), 30)
        height = max(need, node["size"][1]) if node["type"] in STRETCH else need
        node["pos"], node["size"] = [x, y], [node["size"][0], node["size"][1] if folded else height]
        bottom = y + (0 if folded else height)
        y = bottom + GAP + TITLE
    return bottom


def measured(page, workflow: dict) -> dict[str, int]:
    """What every node needs at its width."""
    small = json.loads(json.dumps(workflow))
    for node in small["nodes"]:
        node["size"][1] = 10
    page.evaluate("workflow => app.loadGraphData(workflow)", small)
    page.wait_for_function("wanted => app.graph._nodes.length === wanted", arg=len(small["nodes"]))
    page.wait_for_timeout(1500)  # widgets of the page follow the canvas
    return dict(page.evaluate(HEIGHTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=TEMPLATES, metavar="TITLE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        server = Server(find_hosts(os.environ, Path.home())[0], Path(folder))
        try:
            server.wait_until_ready()
            browser = driver.chromium.launch(executable_path=find_chromium(), args=ARGUMENTS)
            graphs, heights = {title: read(title) for title in args.only}, {title: {} for title in args.only}
            for workflow in graphs.values():
                place(workflow, {})  # the note's width
            for nodes_2 in (False, True):
                use_nodes_2(server.url, nodes_2)
                page = browser.new_page(viewport={"width": 1600, "height": 900})
                open_front_end(page, server.url)
                for title, workflow in graphs.items():
                    for node, height in measured(page, workflow).items():
                        heights[title][node] = max(height, heights[title].get(node, 0))
                page.close()
        finally:
            server.stop()
    for title in args.only:
        workflow = read(title)
        place(workflow, heights[title])
        path_of(title).write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
