"""SafeCFG in a pipeline of diffusers: its prompts are redirected where they are encoded, its guidance behind the denoiser.

    encode_prompt    every positive prompt, once per run: tokens_safe, as in ComfyUI's PREPARE_SAMPLING
    denoiser         [uncond, cond] of one call, or two calls of one step (Flux): cond_safe, before the pipeline's own CFG

Hooks stand on the pipeline's own objects; `Protection.remove` takes them away.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HGRError
from ..hgr import Redirectors
from .protection import Redirector

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Run:
    """What one call of the pipeline needs to know."""

    positive: Tensor | None = None  # the tokens (B, T, D) of the prompts to draw, as the pipeline got them
    negative: Tensor | None = None  # where the pipeline encodes it by itself (Flux)
    waiting: Tensor | None = None  # the output for the prompts, until the one for the negative comes (Flux)


class Protection:
    """SafeCFG in one pipeline, until `remove`."""

    def __init__(self, pipe: Any, redirector: Redirector):
        self.pipe, self.redirector = pipe, redirector
        self.run: Run | None = None  # while the pipeline runs
        self.denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        if self.denoiser is None:
            raise HGRError(f"Expected a pipeline with a unet or a transformer, but got {type(pipe).__name__}.")
        self.family, _ = redirector.check(self.denoiser, pipe.scheduler)
        self._own = {
            "check_inputs": pipe.check_inputs,
            "encode_prompt": pipe.encode_prompt,
            "maybe_free_model_hooks": pipe.maybe_free_model_hooks,
        }
        pipe.check_inputs, pipe.encode_prompt, pipe.maybe_free_model_hooks = self._begin, self._encode_prompt, self._end
        pipe._safecfg = self
        self._hook = self.denoiser.register_forward_hook(self._after, with_kwargs=True) if redirector.by_guidance else None

    def remove(self) -> None:
        """Takes SafeCFG out of the pipeline."""
        for name in (*self._own, "_safecfg"):
            vars(self.pipe).pop(name, None)
        if self._hook is not None:
            self._hook.remove()

    def _begin(self, *args: Any, **kwargs: Any) -> Any:
        """`check_inputs`, every pipeline's first step: a new run begins. The scheduler may be another one by now."""
        self.run = Run()
        self.redirector.check(self.denoiser, self.pipe.scheduler)
        return self._own["check_inputs"](*args, **kwargs)

    def _end(self, *args: Any, **kwargs: Any) -> Any:
        """`maybe_free_model_hooks`, every pipeline's last step."""
        self.run = None
        return self._own["maybe_free_model_hooks"](*args, **kwargs)

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> tuple:
        encoded = list(self._own["encode_prompt"](*args, **kwargs))
        if self.run is None:  # somebody encodes ahead, and the run gets these tokens again
            return tuple(encoded)
        if self.family.packed and self.run.positive is not None:  # Flux encodes its negative by a second call
            self.run.negative = encoded[0]
            return tuple(encoded)
        pooled = None if self.family.pooled is None else encoded[self.family.pooled]
        encoded[0], pooled = self.redirector.prompts(encoded[0], pooled)
        if self.family.pooled is not None:
            encoded[self.family.pooled] = pooled
        self.run.positive = encoded[0]
        return tuple(encoded)

    def _after(self, denoiser: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Forward hook of the denoiser: the output for the prompts, redirected."""
        if self.run is None:  # another pipeline's run, which shares the denoiser
            return output
        x_in = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        predicted = output[0]
        if self.run.positive is None:
            self.redirector.notice("the denoiser runs without a prompt of this pipeline: its guidance is not redirected.")
        elif self.family.packed:
            self._second_of_two(predicted, x_in, timestep, kwargs)
        elif not self.pipe.do_classifier_free_guidance:
            self.redirector.notice("this run has no negative (guidance_scale of at most 1): its guidance is not redirected.")
        elif len(x_in) == 2 * len(self.run.positive):
            uncond, cond = predicted.chunk(2)
            safe = self._redirected(cond, uncond, x_in.chunk(2)[1], timestep, None)
            predicted = torch.cat([uncond, safe])
            return (predicted, *output[1:]) if isinstance(output, tuple) else type(output)(predicted)
        elif len(x_in) != len(self.run.positive):  # that many: skip-layer guidance, beside a call with both
            self.redirector.notice(f"{len(x_in)} rows for {len(self.run.positive)} prompts: their guidance is not redirected.")
        return output

    def _second_of_two(self, predicted: Tensor, x_in: Tensor, timestep: Tensor, kwargs: dict) -> None:
        """The pipeline keeps the first output until it has the second one: that tensor itself is redirected."""
        tokens = kwargs.get("encoder_hidden_states")
        if tokens is self.run.positive:
            self.run.waiting = predicted
            if self.run.negative is None:
                self.redirector.notice(
                    "this run has no negative (true_cfg_scale of at most 1, or no negative_prompt): its guidance is not redirected."
                )
        elif tokens is self.run.negative and self.run.waiting is not None:
            cond, self.run.waiting = self.run.waiting, None
            trained = self.pipe.scheduler.config.num_train_timesteps  # the transformer gets a part of it
            cond.copy_(self._redirected(cond, predicted, x_in, timestep * trained, kwargs["img_ids"]))
        else:
            self.redirector.notice("the denoiser runs with tokens that nobody encoded: its guidance is not redirected.")

    def _redirected(self, cond: Tensor, uncond: Tensor, x_in: Tensor, timestep: Tensor | float, img_ids: Tensor | None) -> Tensor:
        family = self.family
        _, edge = self.redirector.check(self.denoiser, self.pipe.scheduler)
        parts = [family.unpack(part, img_ids) for part in (cond, uncond, x_in)]
        return family.pack(self.redirector.outputs(edge, self.pipe.scheduler, timestep, *parts))


def protect(pipe: Any, hgr: str | os.PathLike | Redirectors, **settings: Any) -> Any:
    """Makes a pipeline of diffusers safe: Stable Diffusion 1.x, XL and 3 or Flux, and their img2img, inpainting and ControlNet kin.

    hgr: a file that SafeCFG Train HGR wrote. settings: see `Redirector`. Pictures that are not flagged stay identical to the
    last bit. Returns what takes it out again (`.remove()`); a modular pipeline gets a guider instead (`SafeGuidance`), which is
    returned. Raises HGRError for an HGR that was trained for another family of models.
    """
    redirector = Redirector(hgr, **settings)
    if (before := vars(pipe).get("_safecfg")) is not None:
        logger.warning("SafeCFG: this pipeline was protected before; only the last HGR counts.")
        before.remove()
    if hasattr(pipe, "update_components"):
        from .guider import SafeGuidance

        guider = SafeGuidance.of(redirector, pipe)
        pipe.update_components(guider=guider)
        return guider
    return Protection(pipe, redirector)
