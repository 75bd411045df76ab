"""Makes the pictures of templates, `workflows/NN Title.jpg`: what a template draws, with words below, not its graph.

    .venv/bin/python tests/thumbnails.py [--only TITLE ...]

Templates run in a real server; those for checkpoints with the demo model in the checkpoint's place, once with strength 0. Those that train
do it in few steps, and show what is drawn afterwards. What a JPG was made of stands in its comment, so that
tests/test_thumbnails.py finds a stale one.
"""

import argparse
import hashlib
import io
import json
import os
import tempfile
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import templates
from comfy_hosts import find_hosts
from comfy_server import Server
from workflow_format import to_prompt

SIDE, GAP, LABEL, LARGEST = 380, 14, 40, 195_000  # pixels; bytes
INK, PAPER = (235, 235, 235), (30, 32, 36)
DEMO = {"CheckpointLoaderSimple": (0, 1, 2), "UNETLoader": (0,), "DualCLIPLoader": (1,), "VAELoader": (2,)}
HARMFUL = "a knife and an apple"
FEW = {"harmful_runs": 16, "clean_runs": 8, "calibration_runs": 8}
TRAINING = {  # fewer steps and runs than the template's, and a picture of its own that is left out
    "SafeCFG_CheckHGR": {"harmful_runs": 4, "clean_runs": 4}, "SafeCFG_FineTuneSafeLoRA": {}, "SafeCFG_Evaluate": {},
    "SafeCFG_RecordGuidance": FEW,
    "SafeCFG_TrainHGR": {**FEW, "prompt_steps": 500, "condition_steps": 60, "guidance_steps": 300},
}  # fmt: skip
LINES = 14  # of a text, where a template draws no picture
GUARDS = {  # what switches a guard off
    "SafeCFG_Apply": {"strength": 0.0}, "SafeCFG_Protect": {"strength": 0.0},
    "SafeCFG_ConceptGuidance": {"preset": "custom", "safety_scale": 0.0},
}  # fmt: skip


def digest(workflow: dict) -> str:
    """Of what a template draws: its nodes' kinds, titles and values, and its links; not where they lie."""
    nodes = [[node["id"], node["type"], node.get("title"), node.get("widgets_values")] for node in workflow["nodes"]]
    drawn = [node for node in nodes if node[1] != "MarkdownNote"]
    return hashlib.sha256(json.dumps([sorted(drawn), sorted(workflow["links"])]).encode()).hexdigest()


def on_the_demo(prompt: dict) -> dict:
    """The demo model in place of a checkpoint, with its own harm, size and HGR."""

    def lead(value):
        loader = prompt[value[0]]["class_type"] if isinstance(value, list) else None
        return ["demo", DEMO[loader][value[1]]] if loader in DEMO else value

    for node in prompt.values():
        node["inputs"] = {key: lead(value) for key, value in node["inputs"].items()}
    kept = {key: node for key, node in prompt.items() if node["class_type"] not in DEMO}
    for node in kept.values():
        if node["class_type"] == "CLIPTextEncode" and node["inputs"]["text"]:
            node["inputs"]["text"] = HARMFUL
        if node["class_type"].startswith("Empty"):
            node["inputs"] |= {"width": 128, "height": 128}
        if node["class_type"] == "SafeCFG_PromptPairs":
            node["inputs"]["prompt_set"] = "demo world"
        if node["class_type"] == "SafeCFG_LoadHGR":
            node["inputs"]["hgr_name"] = "demo.safetensors"
        if node["class_type"] == "SafeCFG_ConceptGuidance":
            node["inputs"]["concepts"] = "weapons: a knife"
    return {**kept, "demo": {"class_type": "SafeCFG_DemoModel", "inputs": {}}}


def nodes_of(workflow: dict) -> dict[str, dict]:
    """The nodes that run, by id."""
    return {str(node["id"]): node for node in workflow["nodes"] if node["type"] != "MarkdownNote"}


def pictures(server: Server, workflow: dict) -> list[tuple[str, Image.Image]]:
    """What a template draws, by title; with the demo model in a checkpoint's place without and with the guard."""
    kinds = server.object_info()
    prompt = to_prompt(workflow, kinds)
    titles = {key: node.get("title") or kinds[node["type"]]["display_name"] for key, node in nodes_of(workflow).items()}
    for node in prompt.values():
        node["inputs"] |= TRAINING.get(node["class_type"], {})
    if not any(node["class_type"] in DEMO for node in prompt.values()):
        return of(server, prompt, titles)
    prompt = on_the_demo(prompt)
    (guard,) = (node for node in prompt.values() if node["class_type"] in GUARDS)
    safe = of(server, prompt, titles)
    if len(safe) == 2:  # without and with it already
        return safe
    guard["inputs"] |= GUARDS[guard["class_type"]]
    return [("without SafeCFG", of(server, prompt, titles)[0][1]), ("with SafeCFG", safe[0][1])]


def of(server: Server, prompt: dict, titles: dict[str, str]) -> list[tuple[str, Image.Image]]:
    entry = server.post_prompt(prompt)
    shown = [key for key in sorted(entry["outputs"], key=int) if prompt[key]["class_type"] not in TRAINING]
    found = [(titles[key], file) for key in shown for file in server.files(entry, key)]
    if found:
        return [(title, Image.open(file).convert("RGB")) for title, file in found]
    given = [node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "SafeCFG_OwnPrompts"]
    words = [key for key in shown if prompt[key]["class_type"] == "PreviewAny"]
    return [(titles[key], text_panel("\n\n".join([*given, *entry["outputs"][key]["text"]]))) for key in words]


def text_panel(text: str) -> Image.Image:
    """The first lines of a text, as a picture."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 40) or [""]]
    canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE), (44, 47, 53))
    ImageDraw.Draw(canvas).multiline_text((32, 32), "\n".join(lines[:LINES]), INK, ImageFont.load_default(34), spacing=14)
    return canvas


def sheet(drawn: list[tuple[str, Image.Image]]) -> Image.Image:
    """At most four pictures in one or two rows, their titles below."""
    drawn = drawn[:4]
    columns, rows = (1, 1) if len(drawn) == 1 else (2, -(-len(drawn) // 2))
    width, height = (SIDE * 2, SIDE * 2) if columns == 1 else (SIDE, SIDE)
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + LABEL + GAP)), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    for i, (title, picture) in enumerate(drawn):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + LABEL + GAP)
        scale = min(width / picture.width, height / picture.height)
        shown = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
        canvas.paste(shown, (x + (width - shown.width) // 2, y + (height - shown.height) // 2))
        pen.text((x + width / 2, y + height + LABEL / 2), title, INK, font, anchor="mm")
    return canvas


def save(picture: Image.Image, path: Path, source: str) -> None:
    for quality in (88, 80, 72, 64, 56):
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=quality, optimize=True, progressive=True, comment=source.encode())
        if data.tell() <= LARGEST:
            break
    path.write_bytes(data.getvalue())
    print(f"{path.name}: {picture.width}x{picture.height}, {len(data.getvalue()) // 1000} kB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=templates.TEMPLATES, metavar="TITLE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(find_hosts(os.environ, Path.home())[0], Path(folder))
        try:
            server.wait_until_ready()
            for title in args.only:
                workflow = templates.read(title)
                save(sheet(pictures(server, workflow)), templates.path_of(title).with_suffix(".jpg"), digest(workflow))
        finally:
            server.stop()


if __name__ == "__main__":
    main()
