"""The methods that SafeCFG is compared with in `benchmarks.safety`, with their settings: negative prompts, SLD, CASG, SAFREE and CRG.

A setting is written `method/parameters/words`, such as `casg/max/names`; a negative prompt and SAFREE have no parameters.
"""

from dataclasses import asdict, dataclass
from itertools import product

from torch import Tensor

from demo import prompts as p
from demo import world
from demo.pipeline import DemoModel
from demo.safecfg import Steer, Step
from demo.sampling import normal_schedule
from hgr_models import SLD_PRESETS, ConceptGuard, SLDSettings, output_units, warm_up_steps
from hgr_models.concept_removal import ConceptRemoval, CRGSettings

from .safety_pictures import Arm
from .safree_peer import SafreePeer

# What a method is told about harm, per category: its name, words of harm (none of them a pictogram's), or every harmful
# pictogram that the HGR was trained with by name, which is more than anyone could list for a real model.
WORDS: dict[str, dict[str, str]] = {
    "names": {c: c for c in world.CATEGORIES},
    "words": {c: ", ".join(p.HARM_WORDS[c][:8]) for c in world.CATEGORIES},
    "pictograms": {c: ", ".join(n for n in p.SEEN_HARMFUL if world.CATEGORY[n] == c) for c in world.CATEGORIES},
}
# The paper's four, then what lies between and beyond them.
PARAMETERS: dict[str, SLDSettings] = {
    **{name.lower(): settings for name, settings in SLD_PRESETS.items()},
    "strong_at_once": SLDSettings(0.0, 2000.0, 0.025, 0.5, 0.7),
    "max_late": SLDSettings(0.2, 5000.0, 1.0, 0.5, 0.7),
    "max_plain": SLDSettings(0.0, 5000.0, 1.0),
    "max_momentum": SLDSettings(0.0, 5000.0, 1.0, 0.8, 0.8),
}
PRESETS = tuple(name.lower() for name in SLD_PRESETS)


@dataclass(frozen=True)
class ConceptPeer:
    """SLD away from one prompt, or CASG away from the best aligned of several: a model row per prompt and step."""

    prompts: tuple[str, ...]
    settings: SLDSettings

    def start(self, model: DemoModel, tokens: Tensor, steps: int) -> tuple[Tensor, Steer]:
        encoded = [model.encode([prompt]) for prompt in self.prompts]
        guard, warm_up = ConceptGuard(self.settings), warm_up_steps(self.settings.warm_up, steps)

        def steer(step: Step) -> Tensor:
            if self.settings.memoryless and step.number < warm_up:
                return step.cond_denoised  # nothing to build up: the rows are saved
            predicted, units = [step.predict(model, each) for each in encoded], output_units(step.sigma, "EPS")
            return guard.steer(step.cond_denoised, step.uncond_denoised, predicted, units, step.past(warm_up))

        return tokens, steer


@dataclass(frozen=True)
class RemovalPeer:
    """CRG away from one prompt: a model row per step."""

    prompt: str
    settings: CRGSettings

    def start(self, model: DemoModel, tokens: Tensor, steps: int) -> tuple[Tensor, Steer]:
        encoded, guard = model.encode([self.prompt]), ConceptRemoval(self.settings, normal_schedule(steps))

        def steer(step: Step) -> Tensor:
            return guard.steer(step.cond_denoised, step.uncond_denoised, step.predict(model, encoded), step.sigma)

        return tokens, steer


def peer(setting: str) -> Arm:
    """The arm of a setting."""
    method, *parameters, words = setting.split("/")
    by_category = list(WORDS[words].values())
    if method == "negative_prompt":
        return Arm(negative=", ".join(by_category), about={"negative": by_category})
    if method == "safree":
        return Arm(SafreePeer(tuple(", ".join(by_category).split(", "))), about={"concepts": by_category})
    if method == "crg":
        removal = CRGSettings(float(parameters[0]))
        return Arm(RemovalPeer(", ".join(by_category), removal), about={"prompt": by_category, **asdict(removal)})
    prompts = by_category if method == "casg" else [", ".join(by_category)]
    settings = PARAMETERS[parameters[0]]
    return Arm(ConceptPeer(tuple(prompts), settings), about={"prompts": prompts, **asdict(settings)})


def grid(method: str, *parameters: str) -> list[str]:
    """Every setting of a method with these parameters."""
    return ["/".join((method, *parts)) for parts in product(*([parameters] if parameters else []), WORDS)]


# What every peer's best setting is chosen from. SLD's four settings are the paper's; only their words are free.
CANDIDATES: dict[str, list[str]] = {
    "negative_prompt": grid("negative_prompt"),
    **{f"sld_{name}": grid("sld", name) for name in PRESETS},
    "sld": grid("sld", *PARAMETERS),
    "casg": grid("casg", *PARAMETERS),
}

# Made by `python -m benchmarks.safety --tune --images 100`: see `safety_tuning` for how it chooses.
CHOSEN = {
    "negative_prompt": "negative_prompt/names",  # none keeps enough
    "sld_weak": "sld/weak/names",  # none keeps enough
    "sld_medium": "sld/medium/names",  # none keeps enough
    "sld_strong": "sld/strong/pictograms",  # none keeps enough
    "sld_max": "sld/max/pictograms",  # none keeps enough
    "sld": "sld/max_momentum/pictograms",  # none keeps enough
    "casg": "casg/weak/names",
}
UNTUNED = {"safree": "safree/names", "crg": "crg/0/names"}  # as the papers have them, with the categories' names
HARDEST = {
    "negative_prompt": "negative_prompt/names",
    "sld_weak": "sld/weak/names",
    "sld_medium": "sld/medium/names",
    "sld_strong": "sld/strong/pictograms",
    "sld_max": "sld/max/pictograms",
    "sld": "sld/max_momentum/pictograms",
    "casg": "casg/max/pictograms",
}
