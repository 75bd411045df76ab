"""The arms of an evaluation: the model alone, under SafeCFG, and under what else one may use; all from the same seeds."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import comfy.sd
import comfy.utils
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ... import hgr_models
from ..concept.concept_guidance import ConceptGuidance
from ..host.hooks import KEY, without_safecfg
from ..loader import HGRModel
from ..redirect.apply import Apply
from .figures import PLAIN

SAFE, NEGATIVE, LORA = "SafeCFG", "negative prompt", "LoRA"
AS_DRAWN = {  # what a table must say of methods that are not their authors' own code to the last part
    "SAFREE": "SAFREE is drawn without its latent re-attention and without its authors' negative prompt.",
    "CRG": "CRG is written from a public restatement of arXiv 2606.29801, with threshold 0, scale 1 and all concepts joined in one prompt: not "
    "its authors' code, nor their settings, which the paper's public text does not give.",
}


@dataclass(frozen=True)
class Arm:
    """`make` gives the MODEL for a prompt; `about` tells settings apart; `negative` is added to the negative prompt.

    `by_prompt`: every prompt has a model of its own.
    """

    name: str
    make: Callable[[str], ModelPatcher]
    about: str = ""
    negative: str = ""
    by_prompt: bool = False


def parse_arms(text: str, model: ModelPatcher, clip: CLIP, hgr: HGRModel | None) -> list[Arm]:
    """Plain and the arms that a widget names, separated by commas. Raises HGRError for one that there is not."""
    asked = dict.fromkeys(part for part in map(str.strip, re.split(r"[,\n]", text)) if part and part.lower() != PLAIN)
    return [Arm(PLAIN, lambda prompt: without_safecfg(model)), *(_arm(name, model, clip, hgr) for name in asked)]


def said_of(arms: list[Arm]) -> list[str]:
    """Notes on how some methods are drawn."""
    return [text for method, text in AS_DRAWN.items() if any(arm.name.split()[0] == method for arm in arms)]


def _arm(name: str, model: ModelPatcher, clip: CLIP, hgr: HGRModel | None) -> Arm:
    if name.lower() == SAFE.lower():
        return _safe(model, hgr)
    if name.lower() == NEGATIVE:
        return Arm(NEGATIVE, lambda prompt: without_safecfg(model), negative=_harm_words(hgr))
    if match := re.fullmatch(rf"{LORA}\s*:?\s+(.+)", name, re.IGNORECASE):
        return _lora(match[1].strip(), model)
    if (found := _concept(name, model, clip, hgr)) is not None:
        return found
    methods = ", ".join(_options("method"))
    raise hgr_models.HGRError(
        f"There is no arm {name!r}. Expected {SAFE}, {NEGATIVE}, {LORA} FILE, or a method of SafeCFG Concept Guidance ({methods}), with a "
        f"preset behind it if wanted ({', '.join(_options('preset'))})."
    )


def _safe(model: ModelPatcher, hgr: HGRModel | None) -> Arm:
    """The model as SafeCFG Apply or Protect left it; one without goes through SafeCFG Apply with its defaults, but strict."""
    if KEY in model.additional_models:
        settings = model.get_attachment(KEY)
        return Arm(SAFE, lambda prompt: model, f"{settings.hgr_hash} {settings.redirect} {settings.categories}")
    if hgr is None:
        raise hgr_models.HGRError(
            "The arm SafeCFG needs an HGR: connect SafeCFG Load HGR to `hgr`, or a model that went through SafeCFG Apply."
        )
    networks = hgr.patcher.model
    both = networks.condition is not None and networks.guidance is not None
    redirect = "both" if both else "guidance" if networks.condition is None else "condition"
    about = f"{hgr.hash} {redirect}"
    return Arm(SAFE, lambda prompt: Apply.execute(without_safecfg(model), hgr, redirect=redirect, strict=True).result[0], about)


def _harm_words(hgr: HGRModel | None) -> str:
    """What a user would write to keep harm out: the HGR's concept prompts, else those of Safe Latent Diffusion."""
    if hgr is not None and (prompts := [text for text in hgr.info.concept_prompts.values() if text.strip()]):
        return ", ".join(prompts)
    default = next(each.default for each in ConceptGuidance.define_schema().inputs if each.id == "concepts")
    return ", ".join(hgr_models.parse_concepts(default).values())


def _lora(file: str, model: ModelPatcher) -> Arm:
    path = folder_paths.get_full_path("loras", file) or folder_paths.get_full_path("loras", f"{file}.safetensors")
    if path is None:
        raise hgr_models.HGRError(f"There is no LoRA {file!r} in models/loras. SafeCFG Fine-tune Safe LoRA makes one.")

    def make(prompt: str) -> ModelPatcher:
        weights = comfy.utils.load_torch_file(path, safe_load=True)
        return comfy.sd.load_lora_for_models(without_safecfg(model), None, weights, 1.0, 0.0)[0]

    return Arm(f"{LORA} {file.removesuffix('.safetensors')}", make, hgr_models.file_hash(path))


def _options(name: str) -> list[str]:
    """The choices of a widget of SafeCFG Concept Guidance."""
    return next(list(each.options) for each in ConceptGuidance.define_schema().inputs if each.id == name)


def _concept(name: str, model: ModelPatcher, clip: CLIP, hgr: HGRModel | None) -> Arm | None:
    """`SLD Strong`, `CASG`: a method of SafeCFG Concept Guidance, with its preset; None for another name."""
    for method in sorted(_options("method"), key=len, reverse=True):
        rest = name.lower().removeprefix(method.lower()).strip()
        presets = {"": None, **{option.lower(): option for option in _options("preset")}}
        if name.lower().startswith(method.lower()) and rest in presets:
            return _guided(method, presets[rest], model, clip, hgr)
    return None


def _guided(method: str, preset: str | None, model: ModelPatcher, clip: CLIP, hgr: HGRModel | None) -> Arm:
    """Concept guidance with the HGR's concept prompts where it has some, else with the node's own."""
    inputs = ConceptGuidance.define_schema().inputs
    values = {each.id: each.default for each in inputs if getattr(each, "default", None) is not None}
    values |= {"method": method, "strict": True, **({"preset": preset} if preset else {})}
    words = hgr if hgr is not None and any(text.strip() for text in hgr.info.concept_prompts.values()) else None
    by_prompt = method == "SAFREE"

    def make(text: str) -> ModelPatcher:
        own = {"prompt": text} if by_prompt else {}
        return ConceptGuidance.execute(without_safecfg(model), clip, hgr=words, **{**values, **own}).result[0]

    return Arm(" ".join(filter(None, (method, preset))), make, "" if words is None else words.hash, by_prompt=by_prompt)
