"""Which models SafeCFG works on: docs/MODELS.md, made from runs of the zoo (tests/host/test_zoo*.py) in a ComfyUI.

    ZOO=all ZOO_OUT=one.json COMFYUI_PATH=PATH python -m pytest -c tests/host/pytest.ini tests/host/test_zoo.py
    ZOO=all ZOO_OUT=two.json COMFYUI_PATH=PATH python -m pytest -c tests/host/pytest.ini tests/host/test_zoo_nodes.py
    python -m benchmarks.which_models one.json two.json > docs/MODELS.md

Mechanics on shrunk networks with random weights: that it runs and learns, not how well.
"""

import argparse
import json
from pathlib import Path

HEAD = """# Which models

Every class of ComfyUI's `comfy.supported_models` as core's own network, **shrunk, with random weights**: this table says what works
mechanically, not how well an HGR of the full model is. It is made by `python -m benchmarks.which_models` from a run of the zoo in {host}.

- *prompts*: the condition redirector rewrites the prompt; *guidance*: the guidance redirector turns the direction; both without `strict` errors.
- *train through the model*: the relative error of the gradient that `train` = both or thorough learns by. All models train with `prompts`
  (from the text encoder alone), which needs no gradient.
- *node*: what `SafeCFG Train HGR` trained in a few steps, with prompts of different lengths: both networks, or the guidance redirector
  alone; SafeCFG Check HGR and Apply then ran. *safe LoRA*: one was learnt, loaded by core, and changed what the model draws. –: not tried
  (models whose frames are rows start from a picture, which the node has no input for).
- Prompts of different lengths never share a batch; clean runs are bit-identical to plain CFG in every row.

| model | core's class | prompts | guidance | train through the model | node | safe LoRA | remarks |
|---|---|---|---|---|---|---|---|
"""
REMARKS = {
    "HiDreamO1": "reads token ids alone: the guidance redirector covers it, `strict` stops; no safe LoRA",
    "HiDream": "Llama states are redirected with the T5 tokens",
    "HunyuanDiT": "mT5 embeddings are redirected with the tokens",
    "HunyuanDiT1": "mT5 embeddings are redirected with the tokens",
    "HunyuanVideo15-quoted": "ByT5 embeddings of quoted text are redirected with the tokens",
    "Anima": "what the model makes of its token ids is redirected; judging a prompt needs the model",
    "ACEStep": "the description is redirected; lyrics are token ids, noticed, and `strict` stops",
    "LTXAV": "the video of audio and video together; no safe LoRA",
    "MiniMaxH3": "the video of audio and video together; one row at a time; no safe LoRA",
    "Omnigen2": "core evaluates one row at a time",
    "Boogu": "core evaluates one row at a time",
}
TAIL = """
Refused with a reason before anything is recorded: models of sound whose latents have one dimension (Stable Audio, ACE-Step 1.5, MiniMax
Music 3), of 3-D shapes (Hunyuan3D, TripoSplat, Trellis2), of one picture from another (Lotus, FlowRVS), and SeedVR2, which has no prompt.

Weights may be quantised (plain fp8, core's layouts of fp8, nvfp4, mxfp8 and int8, and ComfyUI-GGUF's layers were tried) or larger than the GPU:
blocks are then brought to it one by one.
"""


def row(name: str, facts: dict) -> str:
    """A line of the table."""
    yes = lambda key: "yes" if facts.get(key) else "–"  # noqa: E731
    error = facts.get("gradient")
    trained = f"yes ({error:.0e})" if error is not None else "–"
    of = facts["class"] if facts["class"] == name else f"{facts['class']} ({name})"
    node = {"gradient": "both", "guidance alone": "guidance"}.get(facts.get("trained"), "–")
    lora = {True: "yes", False: "no"}.get(facts.get("lora"), "–")
    return (
        f"| {facts.get('model', name)} | {of} | {yes('condition')} | {yes('guidance')} | {trained} | {node} | {lora} | "
        f"{REMARKS.get(name, '')} |"
    )


def merged(files: list[Path]) -> dict[str, dict]:
    """What several runs saw, by variant."""
    found: dict[str, dict] = {}
    for file in files:
        for name, facts in json.loads(file.read_text()).items():
            found.setdefault(name, {}).update(facts)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("found", type=Path, nargs="+", help="what runs of the zoo wrote to ZOO_OUT")
    parser.add_argument("--host", default="ComfyUI", help="the host of that run, as it is called in the text")
    arguments = parser.parse_args()
    found = merged(arguments.found)
    lines = sorted((row(name, facts) for name, facts in found.items()), key=str.casefold)
    print(HEAD.format(host=arguments.host) + "\n".join(lines) + "\n" + TAIL, end="")


if __name__ == "__main__":
    main()
