"""What both trainings share: optimiser, averaged weights, and a state that can be stored and taken up again.

Both trainings draw from generators of their own and know their step, so that a resumed training goes on as if it had
never stopped.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import HGRError

MAX_SKIPPED = 25  # steps in a row whose gradient is not finite


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine to 2 % of the peak."""
    warmup = min(warmup, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


class Averaged:
    """An exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.module, self.decay, self.count = copy.deepcopy(module).train(False).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes in the module's parameters after a step."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


def disguise(tokens: Tensor, scale: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Tokens (B, T, D) of which `share` are perturbed: what text no longer shows, the direction still must.

    `scale`, (D,) or one per token (B, T, D), is the tokens' spread per channel (`ConditionRedirector.units`); up to half of it
    is added. Zeros stay: they are padding, of tokens or of a narrower encoder's channels.
    """
    like = {"generator": generator, "device": generator.device}
    size = (0.5 * torch.rand(len(tokens), 1, 1, **like)).to(tokens) * scale.to(tokens)
    hit = (torch.rand(len(tokens), 1, 1, **like) < share).to(tokens.device)
    return torch.where(hit & (tokens != 0), tokens + size * torch.randn(tokens.shape, **like).to(tokens), tokens)


def thinned(tokens: Tensor, center: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Tokens (B, T, D) with a `share` of the channels at their center, others in every row: a reading must not hang on a few.

    `center`, (D,) or one per token (B, T, D), is what tokens have in common; the distance of the other channels from it grows by
    1 / (1 - share), as in dropout. Zeros stay, as in `disguise`.
    """
    left = torch.rand(len(tokens), 1, tokens.shape[-1], generator=generator, device=generator.device) >= share
    moved = center + (tokens - center) * left.to(tokens) / (1 - share)
    return torch.where(tokens != 0, moved, tokens)


def autocast(device: torch.device) -> torch.autocast:
    """Context in which networks compute in bfloat16; on a CPU without AVX-512 in float32, since bfloat16 is emulated there, many times slower."""
    slow = device.type == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.autocast(device.type, torch.bfloat16, enabled=not slow)


class Training:
    """One network's optimiser, averaged weights, generator and step."""

    def __init__(self, network: nn.Module, steps: int, rate: float, decay: float, seed: int):
        self.network, self.steps, self.rate, self.step, self.skipped = network, steps, rate, 0, 0
        self.mean = Averaged(network, decay)
        self.optimiser = torch.optim.AdamW(network.parameters(), weight_decay=1e-2, betas=(0.9, 0.99))
        self.generator = torch.Generator().manual_seed(seed)
        self.scale = 1.0  # of the loss: a denoiser in fp16 loses small gradients
        self.objective: nn.Module = network  # what a step calls for its losses; subclasses set theirs

    def distribute(self, rank: int) -> None:
        """One of several processes: gradients are averaged over all of them, and every process draws its own samples."""
        self.objective = nn.parallel.DistributedDataParallel(self.objective)
        self.generator.manual_seed(self.generator.initial_seed() + 1000 * rank + self.step)

    def random(self, *shape: int) -> Tensor:
        """Uniform values in [0, 1) on the network's device."""
        return torch.rand(*shape, generator=self.generator).to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def advance(self, loss: Tensor) -> None:
        """One step of the optimiser; a gradient that is not finite is skipped, with a smaller loss scale for the next.

        Raises HGRError when that happens too often in a row.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, self.steps, self.rate)
        self.optimiser.zero_grad()
        (loss * self.scale).backward()
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        for p in parameters:
            p.grad.div_(self.scale)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.step += 1
        if not torch.isfinite(norm):
            self._skip()
            return
        self.skipped = 0
        self.optimiser.step()
        self.mean.update(self.network)

    def _skip(self) -> None:
        self.skipped, self.scale = self.skipped + 1, max(self.scale / 4, 2.0**-8)
        if self.skipped > MAX_SKIPPED:
            raise HGRError(
                f"The gradients of {self.skipped} steps in a row are not finite (NaN or infinity). "
                "Load the model in another precision (bf16 or fp32), or train with redirect by guidance only."
            )

    def finish(self) -> None:
        """Puts the averaged weights into the network."""
        self.network.load_state_dict(self.mean.module.state_dict())

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Everything that a resumed training needs, as tensors and as JSON."""
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"mean.{k}": v for k, v in self.mean.module.state_dict().items()}
        for i, values in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{k}": v for k, v in values.items()}
        tensors["generator"] = self.generator.get_state()
        return tensors, {"step": self.step, "steps": self.steps, "scale": self.scale, "count": self.mean.count}

    def load_state(self, tensors: dict[str, Tensor], about: dict) -> None:
        """Takes up what `state` gave."""
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.network.load_state_dict(part("network."))
        self.mean.module.load_state_dict(part("mean."))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in part("optimiser.").items():
            i, name = key.split(".")
            moments.setdefault(int(i), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.generator.set_state(tensors["generator"])
        self.step, self.steps, self.scale, self.mean.count = (about[k] for k in ("step", "steps", "scale", "count"))


@dataclass
class StepReport:
    """What one step of a training says about itself; accuracies are per category (K,), in [0, 1]."""

    loss: float
    error: float  # distance to the partner's direction after redirection; 1 is about that of no redirection
    before: float  # the same without redirection
    accuracy: list[float]
    held_out: float | None = None  # `error` on runs that are not trained on, now and then, where there are any


def accuracies(logits: Tensor, harms: Tensor) -> list[float]:
    """Share of right answers per category (K,)."""
    return ((logits > 0) == (harms > 0.5)).float().mean(dim=0).tolist()


def on_device(value: Any, device: torch.device) -> Any:
    """Points, Prompts, Texts, or a pair of them, on a device."""
    if isinstance(value, tuple):
        return tuple(on_device(v, device) for v in value)
    return type(value)(*(None if t is None else t.to(device) for t in vars(value).values()))
