"""SafeCFG Evaluate from a command line, through a running ComfyUI: a table for your own checkpoint.

    python -m hgr_models.evaluate i2p.csv coco.csv=clean --checkpoint sdxl.safetensors --hgr mine.safetensors --name my_sdxl

Run it in the pack's folder, in the Python of ComfyUI. The lists lie in ComfyUI's input folder; `--protocol casg` finds its own. The
model comes from a checkpoint, from files of its parts, from the demo model, or from a workflow of yours (exported in API format),
of which everything up to the sampler is taken: loaders, LoRAs, patches, its sampler, scheduler, steps, cfg, size, negative prompt, and what
lies between prompts and sampler (FluxGuidance, ControlNet, reference pictures). What cannot be taken is said before it draws.
Stopped at any time, the same command goes on. The table is printed; files lie in output/safecfg/evaluations/NAME of that ComfyUI.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from .comfy_client import Client, ComfyError
from .comfy_events import listen
from .evaluate_graph import GraphError, from_files, node
from .evaluate_workflow import from_workflow

EVALUATE, JSON = "evaluate", "json"  # ids of nodes
NODE = "SafeCFG_Evaluate"
WIDGETS = {  # of the node, by option
    "name": "name", "protocol": "protocol", "prompts": "prompts_per_list", "images": "images_per_prompt", "seed": "seed", "steps": "steps",
    "cfg": "cfg", "size": "size", "sampler": "sampler", "scheduler": "scheduler", "negative": "negative", "arms": "arms", "judges": "judges",
    "keep_pictures": "keep_pictures", "clean_pictures": "clean_pictures",
}  # fmt: skip
# Links of a workflow that give way to an option.
INSTEAD = {"sigmas": ("steps", "scheduler"), "latent": ("size",), "negative_conditioning": ("negative",)}
KINDS = {"prompts": int, "images": int, "seed": int, "steps": int, "cfg": float}


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    """The command's options. Exits with a message where two of them do not fit together."""
    parser = argparse.ArgumentParser(
        prog="python -m hgr_models.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lists", nargs="*", metavar="LIST", help="FILE, FILE=clean, or 'FILE=harmful, column NAME'")
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="the running ComfyUI (%(default)s)")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="NAME", help="as Load Checkpoint lists it")
    model.add_argument(
        "--diffusion-model", metavar="NAME", help="as Load Diffusion Model lists it; .gguf with the pack ComfyUI-GGUF"
    )
    model.add_argument("--workflow", type=Path, metavar="FILE", help="a workflow, exported in API format")
    model.add_argument("--demo", action="store_true", help="SafeCFG Demo Model, to try this out")
    parser.add_argument(
        "--sampler-node", default="", metavar="NODE", help="with --workflow: the node's number, where it has several samplers"
    )
    parser.add_argument("--text-encoders", nargs="+", default=[], metavar="NAME", help="one to three, with --diffusion-model")
    parser.add_argument(
        "--type", default="flux", metavar="NAME", help="of the text encoders, as Load CLIP lists it (%(default)s)"
    )
    parser.add_argument("--vae", metavar="NAME", help="with --diffusion-model; else the checkpoint's own")
    parser.add_argument(
        "--hgr", metavar="NAME", help="as SafeCFG Load HGR lists it; without it, SafeCFG Protect finds or makes one"
    )
    parser.add_argument(
        "--clip-vision", metavar="NAME", help="as Load CLIP Vision lists it, for CLIP scores, FD-CLIP, CMMD and q16"
    )
    parser.add_argument("--score-clip", metavar="NAME", help="the text encoder of the same CLIP, as Load CLIP lists it")
    for option, widget in WIDGETS.items():
        text = f"{widget} of SafeCFG Evaluate"
        parser.add_argument(f"--{option.replace('_', '-')}", type=KINDS.get(option, str), metavar="X", help=text)
    parser.add_argument("--no-resume", action="store_true", help="begin again, and forget what was drawn under this name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go, too")
    args = parser.parse_args(line)
    if bool(args.diffusion_model) != bool(args.text_encoders):
        parser.error("expected --diffusion-model and --text-encoders together")
    if args.diffusion_model and not args.vae:
        parser.error("expected --vae NAME with --diffusion-model")
    if args.demo and args.hgr is None:
        args.hgr = "demo.safetensors"
    return args


def make_graph(client: Client, args: argparse.Namespace) -> tuple[dict, list[str]]:
    """The graph in API format, and notes on what of a workflow is not used. Raises GraphError and ComfyError for what does not fit."""
    if args.workflow is not None:
        graph, sockets, widgets, notes = from_workflow(read_workflow(args.workflow), args.sampler_node)
    else:
        graph, sockets = from_files(client, args)
        widgets, notes = {}, []
    defaults = {name: spec[1]["default"] for name, spec in client.inputs(NODE).items() if len(spec) > 1 and "default" in spec[1]}
    given = {widget: value for option, widget in WIDGETS.items() if (value := vars(args)[option]) is not None}
    for socket, options in INSTEAD.items():
        if any(option in given for option in options):
            sockets.pop(socket, None)
    lists = {"lists": "\n".join(args.lists), "resume": not args.no_resume}
    own = hgr_nodes(client, args, sockets)
    graph |= own | {EVALUATE: node(NODE, **{**defaults, **widgets, **given, **lists, **sockets})}
    graph[JSON] = node("PreviewAny", source=[EVALUATE, 2])
    for name in ("protocol", "sampler", "scheduler", "keep_pictures"):
        client.check_choice(NODE, name, graph[EVALUATE]["inputs"][name])
    return graph, notes


def hgr_nodes(client: Client, args: argparse.Namespace, sockets: dict) -> dict:
    """The nodes that give an HGR or a guarded model, and a CLIP for scores; `sockets` are changed."""
    nodes = {}
    if args.hgr is not None:
        client.check_choice("SafeCFG_LoadHGR", "hgr_name", args.hgr)
        nodes["hgr"] = node("SafeCFG_LoadHGR", hgr_name=args.hgr)
        sockets["hgr"] = ["hgr", 0]
    elif not sockets.pop("guarded", False):
        nodes["protect"] = node("SafeCFG_Protect", model=sockets["model"], clip=sockets["clip"])
        sockets["model"] = ["protect", 0]
    sockets.pop("guarded", None)
    if args.clip_vision is not None:
        client.check_choice("CLIPVisionLoader", "clip_name", args.clip_vision)
        nodes["vision"] = node("CLIPVisionLoader", clip_name=args.clip_vision)
        sockets["clip_vision"] = ["vision", 0]
    if args.score_clip is not None:
        client.check_choice("CLIPLoader", "clip_name", args.score_clip)
        nodes["text"] = node("CLIPLoader", clip_name=args.score_clip, type="stable_diffusion")
        sockets["score_clip"] = ["text", 0]
    return nodes


def read_workflow(path: Path) -> dict:
    """A graph in API format. Raises GraphError for another file."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(graph, dict) or not all(
            isinstance(node["class_type"], str) and isinstance(node["inputs"], dict) for node in graph.values()
        ):
            raise ValueError("a node has no class_type or no inputs: was its pack missing?")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise GraphError(f"{path} is no workflow in API format ({error}). In ComfyUI: File, Export (API).") from None
    return graph


def tell(text: str) -> None:
    """Shows how far it is; what SafeCFG says of single runs is left out."""
    if "pictures" in text and "\n" not in text:  # not the lines that Load HGR shows
        print(f"\r{text:<70}", end="", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> dict:
    """Queues the evaluation, waits, prints the table; the figures."""
    client, started = Client(args.server), time.monotonic()
    if client.has("SafeCFG_Enforced"):
        raise ComfyError(
            f"The server at {client.url} enforces SafeCFG for every prompt, so it cannot draw the plain arm. Start one without SAFECFG_ENFORCE."
        )
    graph, notes = make_graph(client, args)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    end = listen(client.url, client.name, tell)
    try:
        shown = client.run(graph)
    finally:
        end()
        print(file=sys.stderr)
    results = json.loads(shown[JSON]["text"][0])
    if args.json is not None:
        args.json.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(shown[EVALUATE]["text"][0])
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return results


def main(line: list[str] | None = None) -> None:
    """Runs the command; whatever does not fit ends it with one message."""
    args = arguments(line)
    try:
        run(args)
    except (ComfyError, GraphError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped. What was drawn is kept; the same command goes on.") from None


if __name__ == "__main__":
    main()
