"""The templates for real checkpoints with full-size ones of random weights, loaded by core's loaders: train an HGR, then draw.

Stable Diffusion 1.5 on the newest host by default; `FULL_SIZE=sd15,sdxl,flux` takes the others, too, on every host (up to
20 GiB of memory and minutes each), and `FULL_SIZE=none` leaves all out.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.random_checkpoints import FLUX
from comfy_server import Server
from hgr_models import load_hgr
from workflow_format import to_prompt

ROOT = Path(__file__).parents[2]
WANTED = os.environ.get("FULL_SIZE", "")
DRAW = {"sd15": "safe_checkpoint", "sdxl": "safe_sdxl", "flux": "safe_flux"}
WIDTHS = {"sd15": ("SD15", 768, 768), "sdxl": ("SDXL", 2048, 1280), "flux": ("Flux", 4096, 768)}
FEW = {
    "harmful_runs": 3, "clean_runs": 2, "calibration_runs": 2, "run_steps": 2, "batch": 1, "condition_steps": 2, "guidance_steps": 2,
    "size": "small", "sizes": "64x64", "pairs_per_category": 1, "clean_prompts": 4, "width": 64, "height": 64,
    "steps": 2,
}  # fmt: skip
ONE_RUN = {"harmful_runs": 1, "clean_runs": 1}  # of SafeCFG Check HGR, whose clean runs have 20 steps


@pytest.fixture(params=DRAW)
def family(request, host) -> str:
    newest = (host.path / "app" / "subgraph_manager.py").is_file()
    if request.param not in (WANTED or ("sd15" if newest else "none")).split(","):
        pytest.skip(f"only with {request.param} in the environment variable FULL_SIZE")
    return request.param


@pytest.fixture
def full_size_server(host, family, tmp_path):
    """A server of its own: these models are large, and other tests expect their files to be missing."""
    command = [str(host.python), "-m", "benchmarks.random_checkpoints", "--comfyui", str(host.path), "--family", family]
    subprocess.run([*command, "--models", str(tmp_path / "models")], check=True, cwd=ROOT)
    server = Server(host, tmp_path)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def prompt_of(server, template: str) -> dict:
    """A template as the front end sends it, with few runs and steps, and small pictures."""
    workflow = json.loads((ROOT / "workflows" / f"{template}.json").read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, server.object_info())
    for node in prompt.values():
        few = {**FEW, **(ONE_RUN if node["class_type"] == "SafeCFG_CheckHGR" else {})}
        node["inputs"] |= {k: v for k, v in few.items() if k in node["inputs"]}
    return prompt


def inputs_of(prompt: dict, kind: str) -> dict:
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)


def on_the_family(prompt: dict, family: str) -> dict:
    """The training template changed as the family's own template says."""
    training, loader = inputs_of(prompt, "SafeCFG_TrainHGR"), inputs_of(prompt, "CheckpointLoaderSimple")
    training["name"] = f"{family}_hgr"
    if family == "sdxl":
        loader["ckpt_name"] = "sd_xl_base_1.0.safetensors"
    if family == "flux":
        training |= {"train": "condition", "cfg_min": 1.0, "cfg_max": 1.0}
        (number,) = [key for key, node in prompt.items() if node["inputs"] is loader]
        name = lambda part: Path(FLUX[part]).name  # noqa: E731
        del prompt[number]
        prompt["model"] = {"class_type": "UNETLoader", "inputs": {"unet_name": name("model"), "weight_dtype": "default"}}
        encoders = {"clip_name1": name("clip_l"), "clip_name2": name("t5xxl"), "type": "flux"}
        prompt["text"] = {"class_type": "DualCLIPLoader", "inputs": encoders}
        prompt["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": name("vae")}}
        for node in prompt.values():
            for key, value in node["inputs"].items():
                if isinstance(value, list) and value[0] == number:
                    node["inputs"][key] = [("model", "text", "vae")[value[1]], 0]
                if key == "cfg":
                    node["inputs"][key] = 1.0
    return prompt


def test_train_an_hgr_then_draw_with_it(full_size_server, family):
    server = full_size_server
    server.post_prompt(on_the_family(prompt_of(server, "train_hgr_checkpoint"), family))
    info = load_hgr(server.base / "models" / "hgr" / f"{family}_hgr.safetensors").info
    assert (info.latent_format, info.token_width, info.pooled_width) == WIDTHS[family]

    prompt = prompt_of(server, DRAW[family])
    apply = inputs_of(prompt, "SafeCFG_Apply")
    (save,) = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]

    def draw(**changes) -> np.ndarray:
        apply.update(strict=True, **changes)  # whatever could not be redirected stops the run
        (file,) = server.files(server.post_prompt(prompt), save)
        return np.asarray(Image.open(file))

    flagged = draw(threshold_offset=-1.0, strength=1.0)  # an HGR of two steps knows nothing: everything is harmful
    plain = draw(threshold_offset=-1.0, strength=0.0)
    assert plain.std() > 0 and not np.array_equal(flagged, plain)
    assert np.array_equal(draw(threshold_offset=1.0, strength=1.0), plain)  # nothing is
