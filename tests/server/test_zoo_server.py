"""`train = both` on shrunk models of core's own networks in the real server: prompts of different lengths, trained, loaded and checked."""

import os
import time
from pathlib import Path

import pytest

from comfy_server import Server
from hgr_models import load_hgr

FAMILIES = ("Flux", "LTXAV")
MORE = ("SD3", "QwenImage", "ZImage", "HunyuanVideo15", "WAN22_T2V")  # with ZOO=all
FAMILIES += MORE if os.environ.get("ZOO") == "all" else ()
RUNS = {
    "run_steps": 2, "batch": 2, "sizes": "64x64", "samplers": "euler", "scheduler": "simple", "cfg_min": 1.0, "cfg_max": 3.0,
    "negatives": "(empty)\nlow quality", "seed": 0,
}  # fmt: skip
TRAIN = {
    "train": "both", "harmful_runs": 6, "clean_runs": 2, "calibration_runs": 2, "condition_steps": 4, "prompt_steps": 4, "guidance_steps": 4,
    "learning_rate": 1e-3, "size": "small", "false_positive_rate": 0.05, "checkpointing": True, "resume": True, **RUNS,
}  # fmt: skip


@pytest.fixture(scope="module")
def zoo_server(newest_host, tmp_path_factory):
    server = Server(newest_host, tmp_path_factory.mktemp("zoo"), [Path(__file__).parent / "zoo_pack"])
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def defaults(info: dict) -> dict:
    """A node's widgets as the front end first shows them."""
    found = {}
    for name, spec in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.items():
        more = spec[1] if len(spec) > 1 else {}
        if "default" in more:
            found[name] = more["default"]
        elif isinstance(spec[0], list) or "options" in more:
            found[name] = (spec[0] if isinstance(spec[0], list) else more["options"])[0]
    return found


OTHER_CLIP = {"name": "Flux", "width": 48}
SOURCE = {"model": ["1", 0], "clip": ["1", 1], "prompts": ["2", 0], "latent": ["1", 2]}


def node(info: dict, kind: str, **values) -> dict:
    return {"class_type": kind, "inputs": {**defaults(info[kind]), **values}}


def known(info: dict, kind: str, values: dict) -> dict:
    """The values that a node has widgets for."""
    return {key: value for key, value in values.items() if key in defaults(info[kind]) or key == "name"}


def train_prompt(info: dict, name: str, models: dict[str, str | dict], **changes) -> dict:
    """Models of the zoo by node id, prompt pairs (2), and a training (3) of the model 1."""
    pairs = {"categories": "violence, illegal", "pairs_per_category": 3, "clean_prompts": 20, "calibration_prompts": 10}
    return {
        **{
            key: {"class_type": "ZooModel", "inputs": {"name": model} if isinstance(model, str) else model}
            for key, model in models.items()
        },
        "2": node(info, "SafeCFG_PromptPairs", **pairs),
        "3": node(info, "SafeCFG_TrainHGR", **SOURCE, **known(info, "SafeCFG_TrainHGR", {**TRAIN, "name": name, **changes})),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_both_networks_train_from_nodes(zoo_server, name):
    info = zoo_server.object_info()
    if name not in ("SD3", "Flux", "QwenImage", "WAN22_T2V") and "EmptyQwenImageLayeredLatentImage" not in info:
        pytest.skip("not in this host")
    checked = {**RUNS, "harmful_runs": 2, "clean_runs": 2, "save_as": ""}
    prompt = {
        **train_prompt(info, name, {"1": name}),
        "4": node(info, "SafeCFG_CheckHGR", hgr=["3", 0], **SOURCE, **known(info, "SafeCFG_CheckHGR", checked)),
    }
    entry = zoo_server.post_prompt(prompt)
    hgr = load_hgr(Path(zoo_server.base) / "models" / "hgr" / f"{name}.safetensors")
    assert hgr.condition is not None and hgr.guidance is not None and hgr.info.architecture
    assert "2 harmful runs" in entry["outputs"]["4"]["text"][0]


@pytest.mark.parametrize(
    ("case", "models", "sources", "train", "says"),
    [
        ("another model's CLIP", {"1": "Flux", "5": OTHER_CLIP}, {"clip": ["5", 1]}, "both", "cannot read this CLIP's prompts"),
        (
            "the same, from prompts",
            {"1": "Flux", "5": OTHER_CLIP},
            {"clip": ["5", 1]},
            "prompts",
            "cannot read this CLIP's prompts",
        ),
        (
            "another model's latent",
            {"1": "Flux", "5": "WAN22_T2V"},
            {"latent": ["5", 2]},
            "both",
            "Expected latents with 16 channels",
        ),
        ("no gradient", {"1": "HiDreamO1"}, {}, "condition", "Cannot train"),
    ],
)
def test_a_run_that_will_fail_says_so_before_it_records(zoo_server, prompt_error, case, models, sources, train, says, capsys):
    info, name = zoo_server.object_info(), f"failing {case}"
    if "HiDreamO1" in models.values() and "EmptyQwenImageLayeredLatentImage" not in info:
        pytest.skip("not in this host")
    prompt = train_prompt(info, name, models, train=train)
    prompt["3"]["inputs"] |= sources
    zoo_server.post_prompt(
        {key: prompt[key] for key in models}
        | {"9": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 2], "filename_prefix": "zoo"}}}
    )  # the model is there, as after a picture
    started = time.monotonic()
    with pytest.raises(prompt_error, match=says):
        zoo_server.post_prompt(prompt)
    with capsys.disabled():
        print(f"\n{case}: said after {time.monotonic() - started:.1f} s")
    folder = Path(zoo_server.base) / "output" / "safecfg" / "recordings" / name
    assert not list(folder.glob("*.safetensors"))
