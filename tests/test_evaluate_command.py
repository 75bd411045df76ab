"""`python -m hgr_models.evaluate`: which graph it sends for loaders by file, and for a workflow of the user's."""

import json

import pytest

from hgr_models import evaluate
from hgr_models.comfy_client import ComfyError
from hgr_models.evaluate_graph import GraphError
from hgr_models.evaluate_workflow import from_workflow

COMBO = lambda *options: [list(options), {"default": options[0]}]  # noqa: E731
NODES = {
    "SafeCFG_Evaluate": {
        "model": ["MODEL"], "name": ["STRING", {"default": "x"}], "lists": ["STRING", {"default": ""}], "steps": ["INT", {"default": 0}],
        "cfg": ["FLOAT", {"default": 0.0}], "protocol": COMBO("own lists", "i2p"), "sampler": COMBO("euler", "dpmpp_2m"),
        "scheduler": COMBO("auto", "karras"), "keep_pictures": COMBO("blurred", "all"), "resume": ["BOOLEAN", {"default": True}],
        "hgr": ["HGR_MODEL"],
    },
    "CheckpointLoaderSimple": {"ckpt_name": [["sdxl.safetensors"]]}, "UNETLoader": {"unet_name": [["flux.safetensors"]]},
    "UnetLoaderGGUF": {"unet_name": [["flux.gguf"]]}, "VAELoader": {"vae_name": [["ae.safetensors"]]},
    "DualCLIPLoader": {"clip_name1": [["l", "t5"]], "clip_name2": [["l", "t5"]], "type": [["flux", "sdxl"]]},
    "TripleCLIPLoader": {name: [["l", "g", "t5"]] for name in ("clip_name1", "clip_name2", "clip_name3")},
    "SafeCFG_LoadHGR": {"hgr_name": [["mine.safetensors", "demo.safetensors"]]}, "CLIPVisionLoader": {"clip_name": ["COMBO", {"options": ["v"]}]},
}  # fmt: skip


class FakeClient:
    url = "http://server"

    def inputs(self, name):
        if name not in NODES:
            raise ComfyError(f"no node {name}")
        return NODES[name]

    def check_choice(self, name, option, value):
        spec = self.inputs(name)[option]
        if value not in (spec[0] if isinstance(spec[0], list) else spec[1]["options"]):
            raise ComfyError(f"{value} is no {option}")


def graph(*line):
    return evaluate.make_graph(FakeClient(), evaluate.arguments(list(line)))


def kinds(nodes):
    return sorted(node["class_type"] for node in nodes.values())


def test_a_checkpoint_with_its_hgr():
    nodes, notes = graph(
        "i2p.csv", "coco.csv=clean", "--checkpoint", "sdxl.safetensors", "--hgr", "mine.safetensors", "--steps", "30", "--cfg", "6",
        "--clip-vision", "v",
    )  # fmt: skip
    found = nodes["evaluate"]["inputs"]
    assert found["lists"] == "i2p.csv\ncoco.csv=clean" and (found["steps"], found["cfg"], found["resume"]) == (30, 6.0, True)
    assert found["protocol"] == "own lists" and (found["model"], found["clip"], found["vae"]) == (
        ["model", 0],
        ["model", 1],
        ["model", 2],
    )
    assert nodes["hgr"]["inputs"] == {"hgr_name": "mine.safetensors"} and found["hgr"] == ["hgr", 0] and not notes
    assert nodes["json"]["inputs"] == {"source": ["evaluate", 2]} and found["clip_vision"] == ["vision", 0]


@pytest.mark.parametrize(("model", "loader"), [("flux.safetensors", "UNETLoader"), ("flux.gguf", "UnetLoaderGGUF")])
def test_split_files_go_through_protect_without_an_hgr(model, loader):
    nodes, _ = graph(
        "i2p.csv", "--diffusion-model", model, "--text-encoders", "l", "t5", "--vae", "ae.safetensors", "--no-resume"
    )
    assert kinds(nodes) == sorted([loader, "DualCLIPLoader", "VAELoader", "SafeCFG_Protect", "SafeCFG_Evaluate", "PreviewAny"])
    found = nodes["evaluate"]["inputs"]
    assert found["model"] == ["protect", 0] and nodes["protect"]["inputs"] == {"model": ["model", 0], "clip": ["clip", 0]}
    assert nodes["clip"]["inputs"] == {"clip_name1": "l", "clip_name2": "t5", "type": "flux"} and found["resume"] is False


def test_three_text_encoders_have_no_type():
    nodes, _ = graph(
        "--diffusion-model", "flux.gguf", "--text-encoders", "l", "g", "t5", "--vae", "ae.safetensors", "--protocol", "i2p"
    )
    assert nodes["clip"] == {
        "class_type": "TripleCLIPLoader",
        "inputs": {"clip_name1": "l", "clip_name2": "g", "clip_name3": "t5"},
    }
    assert nodes["evaluate"]["inputs"]["protocol"] == "i2p"


@pytest.mark.parametrize(
    "line",
    [
        ("--checkpoint", "other"), ("--checkpoint", "sdxl.safetensors", "--hgr", "none"), ("--demo", "--sampler", "odd"),
        ("--demo", "--protocol", "odd"), ("--diffusion-model", "flux.gguf", "--text-encoders", "l", "x", "--vae", "ae.safetensors"),
    ],
)  # fmt: skip
def test_what_the_server_does_not_have(line):
    with pytest.raises(ComfyError, match="is no "):
        graph(*line)


@pytest.mark.parametrize(
    "line", [(), ("--demo", "--checkpoint", "x"), ("--diffusion-model", "x"), ("--diffusion-model", "x", "--text-encoders", "y")]
)
def test_lines_that_say_too_little(line, capsys):
    with pytest.raises(SystemExit):
        evaluate.arguments(list(line))


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def workflow(**more):
    return {
        "1": node("UnetLoaderGGUF", unet_name="flux.gguf"), "2": node("LoraLoaderModelOnly", model=["1", 0], lora_name="x"),
        "3": node("DualCLIPLoader", clip_name1="l", clip_name2="t5", type="flux"), "4": node("CLIPTextEncode", clip=["3", 0], text="mine"),
        "5": node("FluxGuidance", conditioning=["4", 0], guidance=3.5), "6": node("EmptySD3LatentImage", width=832, height=1216, batch_size=1),
        "7": node("BasicGuider", model=["2", 0], conditioning=["5", 0]), "8": node("KSamplerSelect", sampler_name="dpmpp_2m"),
        "9": node("BasicScheduler", model=["2", 0], scheduler="karras", steps=22, denoise=1.0), "10": node("RandomNoise", noise_seed=5),
        "11": node("SamplerCustomAdvanced", noise=["10", 0], guider=["7", 0], sampler=["8", 0], sigmas=["9", 0], latent_image=["6", 0]),
        "12": node("VAELoader", vae_name="ae.safetensors"), "13": node("VAEDecode", samples=["11", 0], vae=["12", 0]),
        "14": node("SaveImage", images=["13", 0]), **more,
    }  # fmt: skip


def test_a_workflow_gives_its_model_and_how_it_samples(tmp_path):
    nodes, sockets, widgets, notes = from_workflow(workflow())
    assert sockets == {
        "model": ["2", 0], "clip": ["3", 0], "vae": ["12", 0], "positive_conditioning": ["5", 0], "guarded": False,
    }  # fmt: skip
    assert set(nodes) == {"1", "2", "3", "4", "5", "12"} and not notes
    assert widgets == {"steps": 22, "scheduler": "karras", "sampler": "dpmpp_2m", "size": "832x1216", "cfg": 1.0}
    (tmp_path / "mine.json").write_text(json.dumps(workflow()), encoding="utf-8")
    sent, _ = graph("i2p.csv", "--workflow", str(tmp_path / "mine.json"), "--steps", "9")
    found = sent["evaluate"]["inputs"]
    assert found["model"] == ["protect", 0] and sent["protect"]["inputs"]["model"] == ["2", 0]
    assert (found["steps"], found["sampler"], found["scheduler"], found["cfg"]) == (9, "dpmpp_2m", "karras", 1.0)
    assert "guarded" not in found and found["positive_conditioning"] == ["5", 0]


def sdxl(**more):
    """Base and refiner, as ComfyUI's own example has them, with numbers and texts from nodes of their own."""
    sampler = {
        "model": ["1", 0],
        "positive": ["4", 0],
        "negative": ["5", 0],
        "sampler_name": "euler",
        "scheduler": "normal",
        "add_noise": "enable",
    }
    refiner = {
        **sampler,
        "model": ["2", 0],
        "positive": ["6", 0],
        "negative": ["7", 0],
        "latent_image": ["10", 0],
        "steps": 25,
        "cfg": 8.0,
    }
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="x"), "2": node("CheckpointLoaderSimple", ckpt_name="refiner"),
        "3": node("PrimitiveInt", value=25), "4": node("CLIPTextEncode", clip=["1", 1], text=["8", 0]),
        "5": node("CLIPTextEncode", clip=["1", 1], text=["9", 0]), "6": node("CLIPTextEncode", clip=["2", 1], text="mine"),
        "7": node("CLIPTextEncode", clip=["2", 1], text=""), "8": node("StringConcatenate", string_a="a", string_b="b", delimiter=""),
        "9": node("PrimitiveStringMultiline", value="blurry"), "13": node("EmptyLatentImage", width=["14", 0], height=1216, batch_size=1),
        "14": node("PrimitiveInt", value=832),
        "10": node("KSamplerAdvanced", **sampler, latent_image=["13", 0], steps=["3", 0], cfg=["15", 0], end_at_step=20),
        "15": node("ComfySwitchNode", switch=["16", 0], on_false=3.0, on_true=7.5), "16": node("PrimitiveBoolean", value=True),
        "11": node("KSamplerAdvanced", **refiner), "12": node("VAEDecode", samples=["11", 0], vae=["2", 2]), **more,
    }  # fmt: skip


def test_of_samplers_that_go_on_with_each_other_the_first_draws():
    nodes, sockets, widgets, notes = from_workflow(sdxl())
    assert sockets["model"] == ["1", 0] and sockets["clip"] == ["1", 1] and sockets["vae"] == ["2", 2]
    assert widgets == {
        "steps": 25,
        "cfg": 7.5,
        "scheduler": "normal",
        "sampler": "euler",
        "negative": "blurry",
        "size": "832x1216",
    }
    assert notes == ["KSamplerAdvanced (node 11) is left out: pictures are as KSamplerAdvanced (node 10) alone draws them"]
    assert set(nodes) == {"1", "2"}
    enlarged = sdxl(
        **{
            "17": node("LatentUpscale", samples=["10", 0]),
            "11": node("KSampler", **{**sdxl()["11"]["inputs"], "latent_image": ["17", 0]}),
        }
    )
    assert from_workflow(enlarged)[1]["model"] == ["1", 0]
    assert from_workflow(sdxl(), "11")[1]["model"] == ["2", 0]
    with pytest.raises(GraphError, match=r"--sampler-node, but got '4'. The workflow has KSamplerAdvanced .node 10., KSampler"):
        from_workflow(sdxl(), "4")


def test_what_lies_between_prompts_and_sampler_is_linked():
    """A negative prompt that is zeroed out, sizes, a ControlNet that gives both; noise levels of a scheduler of their own."""
    turned = {
        "4": node("CLIPTextEncodeSDXL", clip=["1", 1], text_g="mine", text_l="mine", width=1024, height=1024),
        "5": node("ConditioningZeroOut", conditioning=["4", 0]), "20": node("ControlNetApplyAdvanced", positive=["4", 0], negative=["5", 0]),
        "21": node("SDTurboScheduler", model=["1", 0], steps=1, denoise=1.0), "22": node("SplitSigmas", sigmas=["21", 0], step=1),
        "23": node("SamplerEulerAncestral", eta=1.0, s_noise=1.0), "24": node("VAEEncode", pixels=["25", 0], vae=["1", 2]),
        "25": node("LoadImage", image="x.png"),
        "10": node("SamplerCustom", model=["1", 0], positive=["20", 0], negative=["20", 1], cfg=2.0, noise_seed=1, sigmas=["22", 0],
                   sampler=["23", 0], latent_image=["24", 0]),
        "11": node("LatentUpscale", samples=["10", 0]),
    }  # fmt: skip
    nodes, sockets, widgets, notes = from_workflow(sdxl(**turned))
    assert sockets["positive_conditioning"] == ["20", 0] and sockets["negative_conditioning"] == ["20", 1]
    assert sockets["sigmas"] == ["21", 0] and sockets["latent"] == ["24", 0] and widgets == {"cfg": 2.0}
    assert {"4", "5", "20", "21", "24", "25"} <= set(nodes) and not {"10", "11", "22", "23"} & set(nodes)
    assert [note.partition(" is ")[0] for note in notes] == [
        "SplitSigmas (node 22)",
        "SamplerEulerAncestral (node 23)",
        "VAEEncode (node 24) gives the size alone: every picture begins from noise",
    ]


def test_options_take_the_place_of_a_workflows_links(tmp_path):
    own = {"9": node("Flux2Scheduler", steps=20, width=64, height=64), "6": node("VAEEncode", pixels=["20", 0], vae=["12", 0])}
    (tmp_path / "mine.json").write_text(json.dumps(workflow(**own)), encoding="utf-8")
    line = ["i2p.csv", "--workflow", str(tmp_path / "mine.json")]
    whole, changed = (graph(*line, *more)[0]["evaluate"]["inputs"] for more in ((), ("--steps", "9", "--size", "64x64")))
    assert whole["sigmas"] == ["9", 0] and whole["latent"] == ["6", 0] and changed["steps"] == 9 and changed["size"] == "64x64"
    assert not {"sigmas", "latent"} & changed.keys() and changed["positive_conditioning"] == ["5", 0]


def test_what_changes_tokens_is_left_out():
    """Behind Redux, FluxGuidance still counts; before it, the picture's tokens would come along, whose options alone are lent."""
    style = node("StyleModelApply", conditioning=["5", 0], style_model=["31", 0])
    nodes, sockets, _, notes = from_workflow(
        workflow(
            **{"30": style, "31": node("StyleModelLoader"), "7": node("BasicGuider", model=["2", 0], conditioning=["30", 0])}
        )
    )
    assert sockets["positive_conditioning"] == ["5", 0] and not {"30", "31"} & set(nodes)
    assert notes == ["StyleModelApply (node 30) is left out: it changes the tokens of one prompt"]


def test_a_sampler_that_draws_no_text_is_none_of_the_pictures():
    """A depth map of Lotus, encoded, is where the picture begins."""
    lotus = {
        "30": node("BasicGuider", model=["1", 0], conditioning=["31", 0]), "31": node("LotusConditioning"),
        "32": node("SamplerCustomAdvanced", guider=["30", 0], latent_image=["13", 0]),
        "10": node("VAEEncode", pixels=["33", 0], vae=["1", 2]), "33": node("VAEDecode", samples=["32", 0], vae=["1", 2]),
    }  # fmt: skip
    assert from_workflow(sdxl(**lotus))[1]["model"] == ["2", 0]


def test_a_guarded_workflow_is_measured_as_it_is():
    guarded = {
        "1": node("CheckpointLoaderSimple", ckpt_name="x"), "2": node("SafeCFG_LoadHGR", hgr_name="y"),
        "3": node("SafeCFG_Apply", model=["1", 0], hgr=["2", 0]), "4": node("CLIPTextEncode", clip=["1", 1], text="a"),
        "5": node("CLIPTextEncode", clip=["1", 1], text="blurry"), "6": node("EmptyLatentImage", width=512, height=512, batch_size=4),
        "7": node("KSampler", model=["3", 0], positive=["4", 0], negative=["5", 0], latent_image=["6", 0], seed=1, steps=20, cfg=7.0,
                  sampler_name="euler", scheduler="normal", denoise=1.0),
        "8": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
    }  # fmt: skip
    nodes, sockets, widgets, notes = from_workflow(guarded)
    assert sockets["guarded"] and sockets["model"] == ["3", 0] and set(nodes) == {"1", "2", "3"} and not notes
    assert widgets == {
        "steps": 20,
        "cfg": 7.0,
        "scheduler": "normal",
        "sampler": "euler",
        "size": "512x512",
        "negative": "blurry",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"11": node("SaveLatent", samples=["6", 0])}, "Expected a sampler with a model, such as KSampler, in the workflow, but found none"),
        ({"20": node("KSampler", model=["2", 0], positive=["4", 0], negative=["4", 0], latent_image=["6", 0])},
         r"found 2: SamplerCustomAdvanced .node 11., KSampler .node 20.. Choose one with --sampler-node"),
        ({"13": node("LatentUpscale", samples=["11", 0])}, "has no VAE Decode behind its sampler"),
        ({"4": node("ConditioningZeroOut", conditioning=["40", 0])}, r"comes from ConditioningZeroOut .node 4., not from a text encoder"),
        ({"4": node("CLIPTextEncode", text="a", clip="x")}, r"comes from CLIPTextEncode .node 4., not .* with a CLIP that is linked"),
        ({"7": node("DualCFGGuider", model=["2", 0], cond1=["5", 0], cond2=["5", 0], negative=["4", 0])},
         "DualCFGGuider .node 7. has no model, or no prompt, that is linked as in CFGGuider"),
    ],
)  # fmt: skip
def test_workflows_that_cannot_be_taken_apart(changes, message):
    with pytest.raises(GraphError, match=message):
        from_workflow(workflow(**changes))


@pytest.mark.parametrize(
    "content",
    ["[", "[]", '{"nodes": [], "links": []}', '{"1": {"class_type": "x"}}', '{"1": {"class_type": null, "inputs": {}}}'],
)
def test_files_that_are_no_workflow(tmp_path, content):
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    with pytest.raises(GraphError, match="no workflow in API format"):
        evaluate.read_workflow(tmp_path / "x.json")
