"""The pictures that `benchmarks.safety` counts: drawn once per arm and kind of prompt, and kept in files."""

import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from demo import evaluate as e
from demo import world
from demo.files import WEIGHTS
from demo.judge import Judge
from demo.pipeline import LATENT_SHAPE, DemoModel
from demo.safecfg import Guard, generate
from hgr_models import file_hash
from hgr_models.lora import LoRA

SHOWN = 4  # pictures of each kind that the grid shows
TIMED, REPEATS = 2, 3  # prompts of each of two kinds, pairs of runs


@dataclass(frozen=True)
class Arm:
    """A way to draw. `about` is JSON and tells it from every other: what its pictures depend on besides the condition."""

    guard: Guard | None = None
    negative: str = ""
    lora: LoRA | None = None
    about: dict = field(default_factory=dict)

    def told(self, prompts: list[str], tokens: torch.Tensor) -> Guard | None:
        """The guard for these prompts and their tokens, which few guards need to know."""
        return self.guard.told(prompts, tokens) if hasattr(self.guard, "told") else self.guard

    def attached(self, model: DemoModel):
        return nullcontext() if self.lora is None else self.lora.attached(model.unet)


@dataclass(frozen=True)
class Condition:
    """How pictures are sampled; sizes in pixels, in steps of 32."""

    steps: int
    cfg: float
    width: int = world.SIZE
    height: int = world.SIZE

    @property
    def shape(self) -> tuple[int, int, int]:
        return LATENT_SHAPE[0], self.height // world.CELL, self.width // world.CELL


class Pictures:
    """Draws what was not drawn before; `items(kind, count)` gives the prompts, `folder` keeps the pictures."""

    def __init__(self, folder: Path, items: Callable[[str, int], list[e.Item]], seed: int, device: str = "cpu"):
        self.model, (self.judge, self.judge_about) = DemoModel.load(device), Judge.load(device)
        self.weights = {name.stem: file_hash(name) for name in sorted(WEIGHTS.glob("*.safetensors"))}
        self.folder, self.items, self.seed = folder, items, seed

    def draw(self, place: str, name: str, arm: Arm, condition: Condition, kind: str, count: int) -> e.Drawn:
        """`count` pictures of a kind, kept in a folder `place`; of them, `pictures` holds only the first SHOWN."""
        path = self._path(place, name, kind)
        facts = {"about": arm.about, "condition": asdict(condition), "n": count, "seed": self.seed, "weights": self.weights}
        facts["device"] = self.model.device.type  # another one computes other last bits
        if (drawn := _kept(path, facts)) is None:
            prompts = [item.prompt for item in self.items(kind, count)]
            tokens = self.model.encode(prompts)
            total = -(-count // e.BATCH) * condition.steps
            with arm.attached(self.model), tqdm(total=total, desc=f"{place}, {name}, {kind}", unit="step") as bar:
                drawn = e.draw(
                    self.model, self.judge, tokens, self.seed, condition.steps, condition.cfg, arm.told(prompts, tokens), bar.update,
                    arm.negative, condition.shape,
                )  # fmt: skip
            drawn.pictures = (drawn.pictures[:SHOWN] * 255).round() / 255  # the same now and when it is read again
            _keep(path, facts, drawn)
        return drawn

    def shown(self, place: str, name: str, kind: str) -> torch.Tensor | None:
        """The first pictures (SHOWN, 3, H, W) of an arm; None where it was drawn into another folder."""
        drawn = _kept(self._path(place, name, kind))
        return None if drawn is None else drawn.pictures

    def _path(self, place: str, name: str, kind: str) -> Path:
        return self.folder / place / f"{name.replace('/', ' ')}-{kind}.safetensors"

    @torch.no_grad()
    def time_ratio(self, arm: Arm, condition: Condition, kinds: tuple[str, str], count: int) -> float:
        """Time of an arm's runs in units of plain CFG's, a few pictures each: the median of runs that take turns."""
        items = [item for kind in kinds for item in self.items(kind, count)[:TIMED]]
        prompts = [item.prompt for item in items]
        tokens = self.model.encode(prompts)
        noise = torch.randn(len(items), *condition.shape, generator=torch.Generator().manual_seed(self.seed)).to(
            self.model.device
        )

        def seconds(of: Arm) -> float:
            started = self._clock()
            with of.attached(self.model):
                generate(
                    self.model, tokens, noise, condition.steps, condition.cfg, of.told(prompts, tokens), negative=of.negative
                )
            return self._clock() - started

        return statistics.median(seconds(arm) / seconds(Arm()) for _ in range(REPEATS))

    def _clock(self) -> float:
        if self.model.device.type == "cpu":
            return time.process_time()  # what other programs do, or that this one is paused, does not count
        torch.cuda.synchronize()
        return time.perf_counter()


def _keep(path: Path, facts: dict, drawn: e.Drawn) -> None:
    """Writes a drawing; the file appears whole or not at all."""
    found = torch.tensor([[name in names for name in world.NAMES] for names in drawn.found])
    tensors = {"latents": drawn.latents, "pictures": (drawn.pictures * 255).round().byte(), "found": found}
    about = {"facts": facts, "seconds_per_step": drawn.seconds_per_step, "rows_per_step": drawn.rows_per_step}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: t.contiguous() for k, t in tensors.items()}, part, {"about": json.dumps(about)})
    os.replace(part, path)


def _kept(path: Path, facts: dict | None = None) -> e.Drawn | None:
    """The drawing in a file, if it was made under the same `facts`; None: under any."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        if facts is not None and about["facts"] != json.loads(json.dumps(facts)):
            return None
        latents, pictures, found = (file.get_tensor(key) for key in ("latents", "pictures", "found"))
    names = [{world.NAMES[i] for i in row.nonzero()[:, 0].tolist()} for row in found]
    return e.Drawn(latents, pictures.float() / 255, names, about["seconds_per_step"], about["rows_per_step"])
