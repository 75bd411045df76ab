"""Workflows and node classes for the tests of server-wide enforcement."""

import types

from safecfg import hgr_models
from safecfg.nodes import NODES
from safecfg.nodes.enforcement import enforce
from safecfg.nodes.enforcement.enforced_graph import WITHOUT_MODEL
from safecfg.nodes.enforcement.names import GUARD, LATENT_GUARD, PICTURE_GUARD, is_link

import nodes as core


def fake(inputs: dict, outputs: tuple, place: str = "comfy_extras.nodes_fake") -> type:
    """A node of a pack (`custom_nodes.<pack>`) or of core (`comfy_extras.<file>`)."""
    members = {"INPUT_TYPES": classmethod(lambda cls: {"required": inputs}), "RETURN_TYPES": outputs}
    return type("Fake", (), {**members, "RELATIVE_PYTHON_MODULE": place})


GUARDS = [enforce.Enforced, enforce.Refused, enforce.EnforcedLatent, enforce.EnforcedPicture]
SCALE = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 100.0})
CLASSES = {
    **{name: cls for name, cls in core.NODE_CLASS_MAPPINGS.items() if not hasattr(cls, "RELATIVE_PYTHON_MODULE")},
    **{node.GET_SCHEMA().node_id: node for node in [*NODES, *GUARDS]},
    "PrimitiveFloat": fake({"value": ("FLOAT", {})}, ("FLOAT",)),
    "Switch": fake({"a": ("*", {}), "b": ("*", {})}, ("COMFY_MATCHTYPE_V3",)),
    "CFGGuider": fake({"model": ("MODEL",), "cfg": SCALE}, ("GUIDER",)),
    "SamplerCustomAdvanced": fake({"guider": ("GUIDER",)}, ("LATENT", "LATENT")),
    "PerpNegGuider": fake({"model": ("MODEL",), "neg_scale": SCALE}, ("GUIDER",)),
    "FreSca": fake({"model": ("MODEL",), "scale_low": SCALE, "scale_high": SCALE}, ("MODEL",)),
    "FutureCoreLoop": type("F", (fake({}, ("*",)),), {"SCHEMA": types.SimpleNamespace(enable_expand=True)}),
    "TheirSampler": fake({"model": ("MODEL",), "steps": ("INT", {"min": 1})}, ("LATENT",), "custom_nodes.their-pack"),
    "TheirPipe": fake({"pipe": ("BASIC_PIPE",)}, ("BASIC_PIPE", ["a", "b"]), "custom_nodes.their-pack"),
    "TheirApi": fake({}, ("IMAGE",), "comfy_api_nodes.nodes_their"),
    "Slipped": type("Slipped", (fake({}, ("IMAGE",)),), {"RELATIVE_PYTHON_MODULE": "", "__module__": "their_module"}),
}
SAMPLER = {"positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "seed": 1, "cfg": 5.0}


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def workflow(**more) -> dict:
    """A prompt whose KSampler takes its MODEL right from the loader; `more` replaces nodes, or adds some."""
    prompt = {
        "1": node("CheckpointLoaderSimple", ckpt_name="x.safetensors"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="x"),
        "3": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "4": node("KSampler", model=["1", 0], **SAMPLER),
        "5": node("VAEDecode", samples=["4", 0], vae=["1", 2]),
        "6": node("PreviewImage", images=["5", 0]),
    }
    return {**prompt, **{name.lstrip("n"): value for name, value in more.items()}}


def unguarded(prompt: dict, classes: dict = CLASSES) -> list:
    """Links by which a node could get a MODEL that did not go through an Enforced node; what the guard of a picture holds goes on
    into Enforced nodes alone, so what goes into it may be bare."""
    before_guard = {
        i for i, entry in prompt.items() if entry["class_type"] == PICTURE_GUARD and kinds_of_users(prompt, i) <= {GUARD}
    }
    found = []
    for node_id, entry in prompt.items():
        for name, value in entry["inputs"].items():
            if entry["class_type"] != GUARD and node_id not in before_guard and is_link(value) and value[0] in prompt:
                source = prompt[value[0]]["class_type"]
                kind = classes[source].RETURN_TYPES[value[1]]
                if source not in (GUARD, LATENT_GUARD, PICTURE_GUARD) and isinstance(kind, str) and kind not in WITHOUT_MODEL:
                    found.append((node_id, name))
    return found


def kinds_of_users(prompt: dict, node_id: str) -> set[str]:
    return {
        entry["class_type"]
        for entry in prompt.values()
        for value in entry["inputs"].values()
        if is_link(value) and value[0] == node_id
    }


def save_hgr(path, hgr):
    hgr_models.save_hgr(path.with_suffix(".safetensors"), hgr.patcher.model)
    return path.with_suffix(".safetensors")
