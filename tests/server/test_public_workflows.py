"""ComfyUI's own text-to-image, inpainting and editing templates on a server that enforces SafeCFG: what the front end queues for them runs, and
clean pictures are those of a server that enforces nothing, to the last bit.

Their models are not here: the demo model stands in for what loaders give, and LoRAs, the shift of a model's noise levels and its picture
size, which belong to those files, are passed by. Small pictures, four steps. Newest host; needs a browser
(CONTRIBUTING.md). `PUBLIC=flux`: those with such a name.
"""

import json
import os
import random

import numpy as np
import pytest
from PIL import Image

import redteam
from demo import world
from front_end import open_front_end

FEWEST = 20
CLEAN, SIDE, STEPS = "a frog and a strawberry", 128, 4
MODEL, CLIP, VAE = 0, 1, 2
LOADERS = {
    "CheckpointLoaderSimple": (MODEL, CLIP, VAE), "UNETLoader": (MODEL,), "VAELoader": (VAE,), "CLIPLoader": (CLIP,),
    "DualCLIPLoader": (CLIP,), "TripleCLIPLoader": (CLIP,), "QuadrupleCLIPLoader": (CLIP,),
}  # fmt: skip
PASSED_BY = {  # nodes, and the input that goes on in their place
    "LoraLoaderModelOnly": "model", "ModelSamplingSD3": "model", "ModelSamplingAuraFlow": "model", "ModelSamplingFlux": "model",
    "FluxKontextImageScale": "image",
}  # fmt: skip
RUN = LOADERS.keys() | PASSED_BY.keys() | set(
    """
    BasicScheduler CFGGuider CLIPTextEncode ConditioningCombine ConditioningSetArea ConditioningSetTimestepRange ConditioningZeroOut
    DifferentialDiffusion EmptyLatentImage EmptySD3LatentImage FluxGuidance FluxKontextImageScale ImagePadForOutpaint ImageScale
    ImageScaleBy ImageStitch InpaintModelConditioning KSampler KSamplerAdvanced KSamplerSelect LatentUpscale LatentUpscaleBy LoadImage
    MarkdownNote Note PreviewImage PrimitiveNode RandomNoise ReferenceLatent Reroute SDTurboScheduler SamplerCustom SamplerCustomAdvanced
    SaveImage SetLatentNoiseMask VAEDecode VAEDecodeTiled VAEEncode VAEEncodeForInpaint
    """.split()
)  # fmt: skip
MADE = """async (workflow) => {
  await app.loadGraphData(workflow);
  return (await app.graphToPrompt()).output;
}"""


def kinds(workflow: dict) -> set[str]:
    """Of all nodes, also in subgraphs."""
    graphs = workflow.get("definitions", {}).get("subgraphs", [])
    nodes = [*workflow["nodes"], *(node for graph in graphs for node in graph["nodes"])]
    return {node["type"] for node in nodes} - {graph["id"] for graph in graphs}


@pytest.fixture(scope="module")
def public(host, newest_host) -> dict[str, dict]:
    """Saved workflows of the host's own package, all of whose nodes can run with the demo model."""
    files = sorted(host.python.parent.parent.glob("lib/python*/site-packages/comfyui_workflow_templates*/templates/*.json"))
    if not files:
        pytest.skip("needs the package comfyui-workflow-templates, as the host's requirements.txt names it")
    saved = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    asked = os.environ.get("PUBLIC", "")
    return {name: w for name, w in saved.items() if asked in name and isinstance(w, dict) and "nodes" in w and kinds(w) <= RUN}


@pytest.fixture(scope="module")
def enforced(host, newest_host, tmp_path_factory):
    found = redteam.start(host, tmp_path_factory.mktemp("public_workflows"))
    try:
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="module")
def prompts(server, browser, public) -> dict[str, dict]:
    """What the front end queues for each."""
    page = browser.new_page()
    open_front_end(page, server.url)
    made = {name: page.evaluate(MADE, workflow) for name, workflow in public.items()}
    return {name: prompt for name, prompt in made.items() if "SaveImage" in {node["class_type"] for node in prompt.values()}}


def on_the_demo(prompt: dict) -> dict:
    """A prompt with the demo model in place of every loader, a clean text, small pictures and few steps."""

    def lead(value):
        while isinstance(value, list) and len(value) == 2 and value[0] in prompt:
            source = prompt[value[0]]
            if source["class_type"] in LOADERS:
                return ["demo", LOADERS[source["class_type"]][value[1]]]
            if source["class_type"] not in PASSED_BY:
                break
            value = source["inputs"][PASSED_BY[source["class_type"]]]
        return value

    made = {"demo": {"class_type": "SafeCFG_DemoModel", "inputs": {}}}
    for key, node in prompt.items():
        if node["class_type"] not in LOADERS and node["class_type"] not in PASSED_BY:
            inputs = {name: lead(value) for name, value in node["inputs"].items()}
            small = {"width": SIDE, "height": SIDE, "image": "small.png", "batch_size": 1}
            if node["class_type"].startswith(("Empty", "LoadImage")):
                inputs |= {name: value for name, value in small.items() if name in inputs}
            if node["class_type"] == "CLIPTextEncode" and isinstance(inputs["text"], str) and inputs["text"].strip():
                inputs["text"] = CLEAN
            if isinstance(inputs.get("steps"), int):
                inputs |= few(inputs)
            made[key] = {"class_type": node["class_type"], "inputs": inputs}
    return made


def few(inputs: dict) -> dict:
    """A sampler's steps made fewer; where it begins and ends in proportion."""
    steps = inputs["steps"]
    ends = {name: inputs[name] for name in ("start_at_step", "end_at_step") if isinstance(inputs.get(name), int)}
    return {
        "steps": min(steps, STEPS),
        **{name: value if value > steps else value * STEPS // steps for name, value in ends.items()},
    }


def pictures(server, prompt: dict) -> dict[str, list[np.ndarray]]:
    folder = server.base / "input"
    folder.mkdir(exist_ok=True)
    scene = Image.fromarray(world.render(world.random_scene(("frog", "strawberry"), random.Random(1))))
    scene.putalpha(255)
    scene.paste((0, 0, 0, 0), (0, 0, SIDE // 2, SIDE // 2))  # what inpainting fills
    scene.save(folder / "small.png")
    entry = server.post_prompt(prompt)
    files = {key: server.files(entry, key) for key in entry["outputs"] if prompt[key]["class_type"] == "SaveImage"}
    return {key: [np.asarray(Image.open(file)) for file in some] for key, some in files.items()}


def test_public_workflows_run_and_clean_pictures_stay(server, enforced, prompts, prompt_error):
    assert len(prompts) >= FEWEST or os.environ.get("PUBLIC")
    wrong = {}
    for name, prompt in prompts.items():
        made = on_the_demo(prompt)
        try:
            plain, guarded = pictures(server, made), pictures(enforced, made)
        except prompt_error as error:
            wrong[name] = redteam.reason_of(error.details)
            continue
        if (
            not plain
            or plain.keys() != guarded.keys()
            or not all(np.array_equal(a, b) for key in plain for a, b in zip(plain[key], guarded[key], strict=True))
        ):
            wrong[name] = ["another picture", *(line for line in enforced.log().splitlines() if "held back" in line)][:2]
    assert wrong == {}
    print(f"{len(prompts)} ran bit-identical: {', '.join(prompts)}")
