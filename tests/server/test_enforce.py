"""A server with SAFECFG_ENFORCE: every way round it that a client can try through the API, and what it costs a clean prompt."""

import json
import os
import textwrap
import urllib.error
import urllib.request
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from demo.pipeline import DemoModel
from hgr_models import HGR, HGRInfo, save_hgr
from hgr_models.condition import ConditionConfig
from hgr_models.guidance import GuidanceConfig

FILE = "enforced.safetensors"
THEIR_PACK = '''
    """Nodes of another pack: a sampler that uses core's guiders, one that does not, and one that adds nodes while it runs."""
    import comfy.model_management
    import comfy.sample
    import comfy.samplers
    import torch
    from comfy_execution.graph_utils import GraphBuilder


    class TheirSampler:
        RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "theirs"

        @classmethod
        def INPUT_TYPES(cls):
            sockets = {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT"}
            return {"required": {name: (kind,) for name, kind in sockets.items()}}

        def run(self, model, positive, negative, latent):
            x = latent["samples"]
            noise = comfy.sample.prepare_noise(x, 1)
            return ({"samples": comfy.sample.sample(model, noise, 3, 5.0, "euler", "normal", positive, negative, x, seed=1)},)


    class TheirOwnLoop(TheirSampler):
        def run(self, model, positive, negative, latent):
            x, sigma = torch.randn_like(latent["samples"]), torch.tensor([5.0])
            conds = [comfy.sampler_helpers.convert_cond(c) for c in (negative, positive)]
            conds = comfy.samplers.process_conds(model.model, x, {"n": conds[0], "p": conds[1]}, x.device)
            options = model.model_options
            comfy.model_management.load_models_gpu([model])
            model.pre_run()
            return ({"samples": comfy.samplers.sampling_function(model.model, x, sigma, conds["n"], conds["p"], 5.0, options)},)


    class TheirExpander(TheirSampler):
        def run(self, model, positive, negative, latent):
            graph = GraphBuilder()
            bare = graph.node("SafeCFG_DemoModel")
            sampler = graph.node(
                "KSampler", model=bare.out(0), positive=positive, negative=negative, latent_image=latent, seed=1, steps=3, cfg=5.0,
                sampler_name="euler", scheduler="normal", denoise=1.0)
            return {"result": (sampler.out(0),), "expand": graph.finalize()}


    NODE_CLASS_MAPPINGS = {"TheirSampler": TheirSampler, "TheirOwnLoop": TheirOwnLoop, "TheirExpander": TheirExpander}
'''


@pytest.fixture(scope="module")
@torch.no_grad()
def prompts() -> tuple[HGR, str, str]:
    """A random HGR that flags one of two prompts by its tokens; the HGR, the prompt that it flags, the clean one."""
    torch.manual_seed(3)
    facts = {"latent_format": "SD15", "latent_channels": 4, "latent_dimensions": 2, "prediction": "EPS", "token_width": 128}
    facts |= {"pooled_width": 0, "picture_thresholds": (1.0, 1.0)}  # no picture is held back
    info = lambda level: HGRInfo(("weapons", "drugs"), (level,) * 2, (), ((1.0, 1.0),), **facts)  # noqa: E731
    hgr = HGR(info(0.5), ConditionConfig(128, 2, width=32, depth=1, delta_depth=1), GuidanceConfig(4, 2, width=32, read_depth=1))
    for parameter in hgr.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    demo, half = DemoModel.load(), hgr.condition.half().float()  # fp16, as in the file
    level = lambda prompt: float(half.harmfulness(demo.encode([prompt])).max())  # noqa: E731
    low, high = sorted(("a knife", "a rabbit"), key=level)
    hgr.calibrate(info((level(low) + level(high)) / 2))
    return hgr.eval(), high, low


@pytest.fixture(scope="module")
def enforced(server, prompts, tmp_path_factory):
    """A server that enforces `prompts`' HGR and allows two nodes of another pack; the plain one has the same HGR in its folder."""

    class Enforced(type(server)):
        def _start(self):
            save_hgr(self.base / "models" / "hgr" / FILE, prompts[0])
            (self.base / "custom_nodes" / "theirs.py").write_text(textwrap.dedent(THEIR_PACK))
            with patch.dict(os.environ, {"SAFECFG_ENFORCE": FILE, "SAFECFG_ENFORCE_ALLOW": "TheirSampler, TheirOwnLoop"}):
                return super()._start()

    save_hgr(server.base / "models" / "hgr" / FILE, prompts[0])
    found = Enforced(server.host, tmp_path_factory.mktemp("enforced"))
    try:
        found.wait_until_ready()
        yield found
    finally:
        found.stop()


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def graph(text: str, negative: str = "", **more) -> dict:
    """A prompt that saves the latents of a text; `more` replaces or adds nodes. 1: MODEL and CLIP, 8: sampler, 9: saves."""
    sampler = {"positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 1, "steps": 3, "cfg": 5.0}
    prompt = {
        "1": node("SafeCFG_DemoModel"),
        "2": node("CLIPTextEncode", clip=["1", 1], text=text),
        "3": node("CLIPTextEncode", clip=["1", 1], text=negative),
        "4": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "8": node("KSampler", model=["1", 0], **sampler, sampler_name="euler", scheduler="normal", denoise=1.0),
        "9": node("SaveLatent", samples=["8", 0], filename_prefix="enforced"),
    }
    changes = {name.lstrip("n"): value for name, value in more.items()}
    for name, value in changes.items():
        prompt[name] = (
            {**value, "inputs": {**prompt[name]["inputs"], **value["inputs"]}} if name in prompt and name == "8" else value
        )
    return prompt


def apply(model=("1", 0), **widgets) -> dict:
    values = {
        "strength": 1.0,
        "threshold_offset": 0.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "redirect": "both",
        "categories": "",
    }
    values |= {"strict": True, "remember_flagged": True}
    return node("SafeCFG_Apply", model=list(model), hgr=["5", 0], **{**values, **widgets})


def latents(server, prompt: dict) -> torch.Tensor:
    (file,) = server.files(server.post_prompt(prompt), "9")
    return load_file(file)["latent_tensor"]


LOAD = {"n5": node("SafeCFG_LoadHGR", hgr_name=FILE)}
TO_6 = {"n8": node("KSampler", model=["6", 0])}
SWITCHED_OFF = {
    "without SafeCFG": {},
    "strength 0": {**LOAD, "n6": apply(strength=0.0), **TO_6},
    "all categories off": {**LOAD, "n6": apply(categories="weapons = off, drugs = off"), **TO_6},
    "thresholds out of reach": {**LOAD, "n6": apply(threshold_offset=1.0), **TO_6},
    "only the guidance": {**LOAD, "n6": apply(redirect="guidance", strict=False), **TO_6},
    "only the last step": {**LOAD, "n6": apply(start_percent=0.99), **TO_6},
    "chained, the last one off": {**LOAD, "n7": apply(), "n6": apply(("7", 0), strength=0.0), **TO_6},
    "a merge with the bare model": {"n6": node("ModelMergeSimple", model1=["1", 0], model2=["1", 0], ratio=1.0), **TO_6},
    "an Enforced node of its own": {"n6": node("SafeCFG_Enforced", value=["1", 0]), **TO_6},
    "a bare model under our node's name": {
        "nsafecfg_1_0": node("SafeCFG_DemoModel"),
        "n8": node("KSampler", model=["safecfg_1_0", 0]),
    },
    "guider and custom sampler": {
        "n6": node("CFGGuider", model=["1", 0], positive=["2", 0], negative=["3", 0], cfg=5.0),
        "n10": node("BasicScheduler", model=["1", 0], scheduler="normal", steps=3, denoise=1.0),
        "n11": node("KSamplerSelect", sampler_name="euler"),
        "n12": node("RandomNoise", noise_seed=1),
        "n13": node(
            "SamplerCustomAdvanced", noise=["12", 0], guider=["6", 0], sampler=["11", 0], sigmas=["10", 0], latent_image=["4", 0]
        ),
        "n9": node("SaveLatent", samples=["13", 0], filename_prefix="enforced"),
    },
    "a sampler of another pack, allowed": {
        "n10": node("TheirSampler", model=["1", 0], positive=["2", 0], negative=["3", 0], latent=["4", 0]),
        "n9": node("SaveLatent", samples=["10", 0], filename_prefix="enforced"),
    },
}


@pytest.fixture(scope="module")
def wanted(server, prompts) -> torch.Tensor:
    """What a strict SafeCFG Apply makes of the harmful prompt, on the server that enforces nothing."""
    safe, plain = (latents(server, graph(prompts[1], **more)) for more in ({**LOAD, "n6": apply(), **TO_6}, {}))
    assert safe.isfinite().all() and not torch.equal(safe, plain)
    return safe


@pytest.mark.parametrize("tried", SWITCHED_OFF.values(), ids=SWITCHED_OFF.keys())
def test_the_harm_is_redirected_whatever_the_workflow_says(enforced, prompts, wanted, tried):
    assert torch.equal(latents(enforced, graph(prompts[1], **tried)), wanted)


@pytest.mark.parametrize("cfg", [5.0, 1.0])
def test_clean_prompts_are_bit_identical(server, enforced, prompts, cfg):
    prompt = graph(prompts[2], n8=node("KSampler", cfg=cfg))
    assert torch.equal(latents(enforced, prompt), latents(server, prompt))


THEIRS = {"positive": ["2", 0], "negative": ["3", 0], "latent": ["4", 0]}
REFUSED = {
    "a node that adds nodes": ({"n10": node("TheirExpander", model=["1", 0], **THEIRS)}, "TheirExpander.* of theirs may sample"),
    "a negative output number": ({"n8": node("KSampler", model=["1", -3])}, "output -3 of node 1"),
    "a link that appears in validation": ({"n8": node("KSampler", model={"__value__": ["1", 0]})}, "hides a link"),
    "training over the HGR": ({"n10": node("SafeCFG_TrainHGR", name="enforced")}, "TrainHGR.* not for a server that enforces"),
    "a third prompt": ({"n10": node("PerpNegGuider", model=["1", 0])}, "third prompt"),
    "guidance that draws the negative": ({"n10": node("VideoLinearCFGGuidance", model=["1", 0], min_cfg=0.0)}, "at least 1"),
    "cfg 0": ({"n8": node("KSampler", cfg=0.0)}, "at cfg 0. Below 1 it draws the negative"),
    "cfg below 0 by a link": ({"n8": node("KSampler", cfg=["10", 0]), "n10": node("PrimitiveFloat", value=-7.0)}, "from 0 to 100"),
    "cfg 0.5 by a link": ({"n8": node("KSampler", cfg=["10", 0]), "n10": node("PrimitiveFloat", value=0.5)}, "at cfg 0.5"),
    "another family": (
        {"n6": node("ModelSamplingDiscrete", model=["1", 0], sampling="v_prediction", zsnr=False), **TO_6}, "no HGR for a model of"
    ),
    "a loop of its own, allowed": (
        {"n10": node("TheirOwnLoop", model=["1", 0], **THEIRS), "n9": node("SaveLatent", samples=["10", 0], filename_prefix="x")},
        "bypasses ComfyUI's guiders",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tried", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_enforced_does_not_run(enforced, prompt_error, prompts, tried, reason):
    written = len(list((enforced.base / "output").rglob("*.latent")))
    with pytest.raises(prompt_error, match=reason):
        enforced.post_prompt(graph(prompts[2], negative=prompts[1], **tried))
    assert len(list((enforced.base / "output").rglob("*.latent"))) == written


def test_a_refusal_says_why_and_nothing_is_queued(enforced, prompts):
    """Also when the client asks for some of the outputs only."""
    prompt = graph(prompts[1], n10=node("TheirExpander", model=["1", 0], **THEIRS))
    body = json.dumps({"prompt": prompt, "partial_execution_targets": ["9"]}).encode()
    request = urllib.request.Request(enforced.url + "/prompt", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 400
    answer = json.loads(caught.value.read())
    assert answer["node_errors"] == {} and answer["error"]["type"] == "safecfg" and answer["error"]["code"] == "node-not-allowed"
    assert "SafeCFG (enforced): node 10 (TheirExpander)" in answer["error"]["details"]
    queue = enforced.get("/queue")
    assert queue == {"queue_running": [], "queue_pending": []}


def test_the_server_says_what_it_enforces(server, enforced):
    assert "SafeCFG: enforced for every prompt" in enforced.log() and FILE in enforced.log()
    for name in ("SafeCFG_Enforced", "SafeCFG_Refused", "SafeCFG_EnforcedLatent", "SafeCFG_EnforcedPicture"):
        info = enforced.object_info()[name]
        inputs = [spec for kind in ("required", "optional") for spec in info["input"].get(kind, {}).values()]
        assert info["description"] and inputs and all(spec[1]["tooltip"] for spec in inputs)
        assert (enforced.base / "custom_nodes" / "safecfg" / "web" / "docs" / f"{name}.md").is_file()
        assert name not in server.object_info()
