"""A user's workflow in API format, taken apart for an evaluation: its model, how it samples, and what it does with its prompts."""

from typing import Any

from .evaluate_graph import GraphError
from .evaluate_links import LARGEST_WALK, Graph, above, gathered, is_link, is_sampler, kind_of, resolved

GUARDS = ("SafeCFG_Apply", "SafeCFG_Protect")
PLAIN = ("CLIPTextEncode", "SafeCFG_TextEncode")
# Encoders of one text, or of the same text for several towers; where the text stands.
TEXTS = {
    **dict.fromkeys(PLAIN, "text"), "CLIPTextEncodeFlux": "t5xxl", "CLIPTextEncodeSDXL": "text_g", "CLIPTextEncodeSD3": "t5xxl",
    "CLIPTextEncodeHiDream": "t5xxl", "CLIPTextEncodeHunyuanDiT": "bert",
}  # fmt: skip
NEW_TOKENS = (  # nodes whose change of the tokens cannot be repeated for another prompt
    "ConditioningAverage", "ConditioningCombine", "ConditioningConcat", "StyleModelApply", "StyleModelApplyAdvanced",
)  # fmt: skip
EMPTY = "Empty"  # how nodes of empty latents begin


def from_workflow(graph: Graph, at: str = "") -> tuple[Graph, dict, dict, list[str]]:
    """(nodes, links for the sockets, values for widgets, notes on what is left out) of a workflow in API format.

    Taken are the model as it enters the sampler, the CLIP of its positive prompt, the VAE behind it, how it samples, and what it adds
    to its prompts. A model that goes through SafeCFG Apply or Protect there is measured as it is. `at`: the sampler's node; "": the
    first of the picture that is decoded last. Raises GraphError where something is not found, or is there twice.
    """
    notes: list[str] = []
    sampler = _sampler(graph, at, notes)
    facts = gathered(graph, sampler)
    model, positive = facts.get("model"), facts.get("positive", facts.get("conditioning"))
    if not is_link(model) or not is_link(positive):
        guider = facts.get("guider")
        kind = kind_of(graph, guider[0]) if is_link(guider) else kind_of(graph, sampler)
        raise GraphError(
            f"{kind} has no model, or no prompt, that is linked as in CFGGuider. An evaluation draws with a prompt and a negative prompt: put "
            "KSampler or CFGGuider in its place."
        )
    sockets: dict[str, Any] = {"model": model, "vae": _vae_behind(graph, sampler)}
    widgets = _widgets(graph, facts, sockets, notes)
    sockets["clip"] = _positive(graph, positive, sockets, notes)
    _negative(graph, facts, sockets, widgets, notes)
    _latent(graph, facts, sockets, widgets, notes)
    kept = {key for link in sockets.values() for key in above(graph, link)}
    sockets["guarded"] = any(graph[key]["class_type"] in GUARDS for key in above(graph, model))
    return {key: graph[key] for key in graph if key in kept}, sockets, widgets, notes


def _sampler(graph: Graph, at: str, notes: list[str]) -> str:
    """The node that begins the picture: of several that go on with each other's, such as a refiner or an enlargement, the first."""
    samplers = [key for key, each in graph.items() if is_sampler(each["inputs"])]
    names = ", ".join(kind_of(graph, key) for key in samplers)
    if at:
        if at not in samplers:
            raise GraphError(f"Expected a sampler's node as --sampler-node, but got {at!r}. The workflow has {names or 'none'}.")
        return at
    last = [key for key in samplers if not any(key in above(graph, [other, 0]) for other in samplers if other != key)]
    if len(last) != 1:
        raise GraphError(
            f"Expected one sampler with a model at the end of the workflow, but found {len(last)}: {names or 'none'}. Choose one with "
            "--sampler-node NODE."
            if last
            else "Expected a sampler with a model, such as KSampler, in the workflow, but found none."
        )
    chain = last
    while (earlier := _earlier(graph, chain[-1])) and earlier not in chain and _has_prompt(graph, earlier):
        chain.append(earlier)
    notes += [
        f"{kind_of(graph, key)} is left out: pictures are as {kind_of(graph, chain[-1])} alone draws them" for key in chain[:-1]
    ]
    return chain[-1]


def _earlier(graph: Graph, sampler: str) -> str:
    """The sampler whose picture another one goes on with, through latents and pictures, not through prompts; "" without one."""
    inputs = graph[sampler]["inputs"]
    waiting = [inputs.get("latent_image", inputs.get("latent"))]
    seen: set[str] = set()
    while waiting:
        link = waiting.pop(0)
        if not is_link(link) or link[0] not in graph or link[0] in seen:
            continue
        seen.add(link[0])
        each = graph[link[0]]
        if is_sampler(each["inputs"]):
            return link[0]
        # Not the size of an empty one, nor a picture beside a prompt, as in InpaintModelConditioning.
        if not each["class_type"].startswith(EMPTY) and "positive" not in each["inputs"]:
            waiting += each["inputs"].values()
    return ""


def _has_prompt(graph: Graph, sampler: str) -> bool:
    """Whether a sampler draws a text; one that makes a depth map, say, does not."""
    facts = gathered(graph, sampler)
    try:
        return bool(_encoder(graph, facts.get("positive", facts.get("conditioning"))))
    except GraphError:
        return False


def _encoder(graph: Graph, link: list) -> tuple[list, list[list]]:
    """The link to the node that encodes a conditioning's text, and to those in between. Raises GraphError without one."""
    passed: list[list] = []
    while (link := resolved(graph, link)) and is_link(link) and link[0] in graph and len(passed) < LARGEST_WALK:
        inputs = graph[link[0]]["inputs"]
        if is_link(inputs.get("clip")):
            return link, passed
        passed.append(link)
        names = ("conditioning", "negative" if link[1] == 1 else "positive", "positive", "conditioning_1", "conditioning_to")
        link = next((inputs[name] for name in names if is_link(inputs.get(name))), ["", 0])
    end = kind_of(graph, passed[-1][0]) if passed else "nothing"
    raise GraphError(f"The prompt comes from {end}, not from a text encoder with a CLIP that is linked, such as CLIPTextEncode.")


def _positive(graph: Graph, link: list, sockets: dict, notes: list[str]) -> list:
    """The CLIP's link; what lies between encoder and sampler goes into `sockets`, for its options are lent to every prompt."""
    encoder, passed = _encoder(graph, link)
    kind = graph[encoder[0]]["class_type"]
    changes = [key for key, _ in passed if graph[key]["class_type"] in NEW_TOKENS]
    notes += [f"{kind_of(graph, key)} is left out: it changes the tokens of one prompt" for key in changes]
    if kind not in TEXTS:
        notes.append(
            f"prompts are encoded as by CLIPTextEncode, not as by {kind_of(graph, encoder[0])}; its pictures and sizes count"
        )
    lent = [each for each in passed if each[0] not in changes] + ([] if kind in PLAIN else [encoder])
    if lent:
        sockets["positive_conditioning"] = lent[0]
    return graph[encoder[0]]["inputs"]["clip"]


def _negative(graph: Graph, facts: dict, sockets: dict, widgets: dict, notes: list[str]) -> None:
    """The negative prompt: as a text where it is one, else as the workflow makes it."""
    if not is_link(link := facts.get("negative")):
        if "guider" in facts and "cfg" not in facts:
            widgets["cfg"] = 1.0  # BasicGuider
        return
    encoder, passed = _encoder(graph, link)
    each = graph[encoder[0]]
    text = resolved(graph, each["inputs"].get(TEXTS.get(each["class_type"], "")))
    if isinstance(text, str) and not any(graph[key]["class_type"] == "ConditioningZeroOut" for key, _ in passed):
        widgets["negative"] = text
    if passed or each["class_type"] not in PLAIN or not isinstance(text, str):
        sockets["negative_conditioning"] = link


def _vae_behind(graph: Graph, sampler: str) -> list:
    """The VAE of the decoder that gets the sampler's latent."""
    for each in graph.values():
        inputs = each["inputs"]
        if is_link(inputs.get("vae")) and sampler in above(graph, inputs.get("samples")):
            return inputs["vae"]
    raise GraphError("The workflow has no VAE Decode behind its sampler. Judges look at pictures.")


def _widgets(graph: Graph, facts: dict, sockets: dict, notes: list[str]) -> dict:
    """How the workflow samples, in the node's own widgets; noise levels of a scheduler of their own go into `sockets`."""
    facts = dict(facts)
    scheduler = resolved(graph, facts.get("sigmas"))
    while is_link(scheduler) and is_link(graph.get(scheduler[0], {"inputs": {}})["inputs"].get("sigmas")):
        notes.append(f"{kind_of(graph, scheduler[0])} is left out: every noise level of the run is drawn")
        scheduler = graph[scheduler[0]]["inputs"]["sigmas"]  # SplitSigmas: another sampler draws the rest
    if is_link(scheduler) and graph.get(scheduler[0], {}).get("class_type") == "BasicScheduler":
        facts |= graph[scheduler[0]]["inputs"]
    elif is_link(scheduler):
        sockets["sigmas"] = scheduler
    if is_link(chosen := resolved(graph, facts.get("sampler"))) and "sampler_name" not in facts:
        notes.append(f"{kind_of(graph, chosen[0])} is left out: the sampler is euler, or what --sampler says")
    values: dict[str, Any] = {}
    for name, kinds in {
        "steps": (int,),
        "cfg": (int, float),
        "scheduler": (str,),
        "sampler_name": (str,),
        "denoise": (int, float),
    }.items():
        value = resolved(graph, facts.get(name))
        if isinstance(value, kinds):
            values[name] = value
        elif value is not None:
            notes.append(f"{name} is computed by {kind_of(graph, value[0])} and left to the evaluation")
    if values.pop("denoise", 1) != 1:
        notes.append("denoise is left out: every picture is drawn from noise alone")
    if "sampler_name" in values:
        values["sampler"] = values.pop("sampler_name")
    return values


def _latent(graph: Graph, facts: dict, sockets: dict, widgets: dict, notes: list[str]) -> None:
    """The size of an empty latent; another one's shape goes into `sockets`."""
    link = resolved(graph, facts.get("latent_image", facts.get("latent")))
    if not is_link(link) or link[0] not in graph:
        return
    each = graph[link[0]]
    sides = [resolved(graph, each["inputs"].get(side)) for side in ("width", "height")]
    if each["class_type"].startswith(EMPTY) and all(isinstance(side, int) for side in sides) and "length" not in each["inputs"]:
        widgets["size"] = "{}x{}".format(*sides)
        return
    sockets["latent"] = link
    if not each["class_type"].startswith(EMPTY):
        notes.append(f"{kind_of(graph, link[0])} gives the size alone: every picture begins from noise")
