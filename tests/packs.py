"""Graphs that try other people's packs with SafeCFG: one per node of theirs that samples, guides, or patches a model."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

HARMFUL, CLEAN, NEGATIVE = "a knife", "a strawberry", ""
STEPS, SEED, CFG = int(os.environ.get("PACKS_STEPS", "12")), 1, 5.0
LINK = {  # by type: what a node's socket gets
    "MODEL": ["model", 0], "CLIP": ["demo", 1], "VAE": ["demo", 2], "LATENT": ["latent", 0], "MASK": ["mask", 0], "IMAGE": ["image", 0],
    "SAMPLER": ["sampler", 0], "SIGMAS": ["sigmas", 0], "NOISE": ["noise", 0], "GUIDER": ["guider", 0], "CONDITIONING": ["positive", 0],
}  # fmt: skip
NEGATIVES = ("neg", "uncond", "empty")  # parts of the names of inputs that get the negative prompt
# Of some nodes: what the defaults leave out. A couple node needs regions: the harmful prompt in the right half.
REGIONS = {"positive": ["regions", 0]}
INPUTS = {
    "Attention couple": {**REGIONS, "mode": "Attention"},
    "AttentionCouplePPM": {"base_cond": ["left", 0], "base_mask": ["left_mask", 0], "cond_1": ["right", 0], "mask_1": ["right_mask", 0]},
}  # fmt: skip
TEXTS = {"PCTextEncode": "a frog COUPLE MASK(0.5 1) {text}", "PCLazyTextEncode": "a frog COUPLE MASK(0.5 1) {text}"}


@dataclass(frozen=True)
class Subject:
    """A node to try. `kind`: patch, sampler, guider, sampler object or encoder."""

    name: str
    kind: str
    about: dict

    @property
    def pack(self) -> str:
        """The folder of its pack."""
        return self.about["python_module"].removeprefix("custom_nodes.")

    def inputs(self, given: dict) -> dict | None:
        """Its inputs; None when one of them is of a type that only its own pack makes."""
        sections = self.about["input"]
        found = {}
        for section in ("required", "optional"):
            for name, spec in sections.get(section, {}).items():
                value = _value_of(name, spec, given)
                if value is not None:
                    found[name] = value
                elif section == "required":
                    return None
        return {**found, **{k: v for k, v in INPUTS.get(self.name, {}).items()}}


def subjects(info: dict, core: set[str]) -> list[Subject]:
    """The nodes of a pack that take part in sampling."""
    found = [Subject(name, kind, about) for name, about in info.items() if name not in core and (kind := _kind(name, about))]
    return [subject for subject in found if "compile" not in subject.name.lower()]  # minutes each, and no hook of ours


def _kind(name: str, about: dict) -> str | None:
    takes = {_type(spec) for section in ("required", "optional") for spec in about["input"].get(section, {}).values()}
    gives = set(map(str, about["output"]))
    if name in TEXTS:
        return "encoder"
    names = {input_name for section in ("required", "optional") for input_name in about["input"].get(section, {})}
    if (
        "LATENT" in gives
        and takes & {"MODEL", "GUIDER"}
        and names & {"seed", "noise_seed", "steps", "sigmas", "sampler_name", "sampler"}
    ):
        return "sampler"
    if "MODEL" in takes and "GUIDER" in gives:
        return "guider"
    if "MODEL" in takes and "MODEL" in gives:
        return "patch"
    return "sampler object" if "SAMPLER" in gives and "SAMPLER" not in takes else None


def _type(spec) -> str:
    return spec[0] if isinstance(spec[0], str) else "COMBO"


def _value_of(name: str, spec: list, given: dict):
    kind, options = _type(spec), spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    if kind == "CONDITIONING" and any(part in name.lower() for part in NEGATIVES):
        return ["negative", 0]
    known = {
        "seed": SEED,
        "noise_seed": SEED,
        "steps": STEPS,
        "cfg": CFG,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    if name in known and (choices is None or known[name] in choices):
        return known[name]
    if kind in given:
        return given[kind]
    if "default" in options:
        return options["default"]
    if choices:
        return choices[0]
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}.get(kind)


def _node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(subject: Subject, text: str, safecfg: str | None, info: dict) -> dict | None:
    """A prompt (API format) that samples through a node and saves the latent (node `save`); None: it cannot be connected.

    safecfg: before or after the node (patches), None: without.
    """
    order = ["demo", "apply", "subject"] if safecfg == "before" else ["demo", "subject", "apply"]
    model = ["demo", 0]
    prompt = _world(text)
    for place in order[1:]:
        if place == "apply" and safecfg:
            prompt["apply"] = _node("SafeCFG_Apply", model=model, hgr=["hgr", 0], strict=True)
            model = ["apply", 0]
        elif place == "subject" and subject.kind == "patch":
            inputs = subject.inputs({**LINK, "MODEL": model})
            if inputs is None:
                return None
            prompt["subject"] = _node(subject.name, **inputs)
            model = ["subject", list(map(str, subject.about["output"])).index("MODEL")]
    for name in ("sigmas", "guider"):
        prompt[name]["inputs"]["model"] = model
    last = _last(subject, prompt, model, text)
    if last is None:
        return None
    prompt["save"] = _node("SaveLatent", samples=last, filename_prefix="packs")
    return _reachable(prompt)


def _last(subject: Subject, prompt: dict, model: list, text: str) -> list | None:
    """The link to the latent that is drawn."""
    given = {**LINK, "MODEL": model}
    gives = list(map(str, subject.about["output"]))
    if subject.kind == "encoder":
        prompt["subject"] = _node(subject.name, clip=["demo", 1], text=TEXTS[subject.name].format(text=text))
        prompt["guider"]["inputs"]["positive"] = ["subject", gives.index("CONDITIONING")]
    elif subject.kind == "patch":
        if "CONDITIONING" in gives and "CONDITIONING" in map(_type, subject.about["input"].get("required", {}).values()):
            prompt["guider"]["inputs"]["positive"] = ["subject", gives.index("CONDITIONING")]
        elif "base_cond" in prompt["subject"]["inputs"]:
            prompt["guider"]["inputs"]["positive"] = prompt["subject"]["inputs"]["base_cond"]
    else:
        inputs = subject.inputs(given)
        if inputs is None:
            return None
        prompt["subject"] = _node(subject.name, **inputs)
        if subject.kind == "sampler":
            return ["subject", gives.index("LATENT")]
        custom = prompt["custom"]["inputs"]
        if subject.kind == "guider":
            custom["guider"] = ["subject", gives.index("GUIDER")]
        else:
            custom["sampler"] = ["subject", gives.index("SAMPLER")]
    return ["custom", 0]


def _world(text: str) -> dict:
    clip = ["demo", 1]
    mask = lambda value: _node("SolidMask", value=value, width=128, height=128)  # noqa: E731
    half = lambda x, base: _node("MaskComposite", destination=[base, 0], source=["part", 0], x=x, y=0, operation="add")  # noqa: E731
    return {
        "demo": _node("SafeCFG_DemoModel"),
        "hgr": _node("SafeCFG_LoadHGR", hgr_name="demo.safetensors"),
        "positive": _node("CLIPTextEncode", clip=clip, text=text),
        "negative": _node("CLIPTextEncode", clip=clip, text=NEGATIVE),
        "left": _node("CLIPTextEncode", clip=clip, text="a frog"),
        "right": _node("CLIPTextEncode", clip=clip, text=text),
        "latent": _node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "image": _node("EmptyImage", width=128, height=128, batch_size=1, color=0),
        "mask": mask(1.0),
        "none": mask(0.0),
        "part": _node("SolidMask", value=1.0, width=64, height=128),
        "left_mask": half(0, "none"),
        "right_mask": half(64, "none"),
        "left_region": _node("ConditioningSetMask", conditioning=["left", 0], mask=["left_mask", 0], strength=1.0, set_cond_area="default"),
        "right_region": _node(
            "ConditioningSetMask", conditioning=["right", 0], mask=["right_mask", 0], strength=1.0, set_cond_area="default"
        ),
        "regions": _node("ConditioningCombine", conditioning_1=["left_region", 0], conditioning_2=["right_region", 0]),
        "sampler": _node("KSamplerSelect", sampler_name="euler"),
        "sigmas": _node("BasicScheduler", model=["demo", 0], scheduler="normal", steps=STEPS, denoise=1.0),
        "noise": _node("RandomNoise", noise_seed=SEED),
        "guider": _node("CFGGuider", model=["demo", 0], positive=["positive", 0], negative=["negative", 0], cfg=CFG),
        "custom": _node(
            "SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0], sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
    }  # fmt: skip


def _reachable(prompt: dict) -> dict:
    """Only what the saved latent needs."""
    needed, todo = set(), ["save"]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += [v[0] for v in prompt[name]["inputs"].values() if isinstance(v, list) and len(v) == 2 and v[0] in prompt]
    return copy.deepcopy({name: node for name, node in prompt.items() if name in needed})


def packs_of(folder: str) -> list[Path]:
    """The packs in a folder: each a folder with an `__init__.py`."""
    return sorted(path for path in Path(folder).expanduser().iterdir() if (path / "__init__.py").is_file())
