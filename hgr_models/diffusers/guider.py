"""SafeCFG as a guider of diffusers' modular pipelines: classifier-free guidance that redirects prompts and guidance first."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from ..errors import HGRError
from .protection import Redirector

TOKENS = ("prompt_embeds", "encoder_hidden_states")  # names that modular pipelines give a prompt's tokens
POOLED = ("text_embeds", "pooled_projections")  # and its pooled vector


class SafeGuidance(ClassifierFreeGuidance):
    """`ClassifierFreeGuidance` with SafeCFG. Make it with `protect(pipe, hgr)`, or with `SafeGuidance.of`."""

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        self.redirector: Redirector | None = None
        self.pipe: Any = None
        self._x_in: Tensor | None = None
        self._hook: Any = None
        self._prompts: tuple = (None, None, None, None)  # given, and redirected: tokens and pooled

    @classmethod
    def of(cls, redirector: Redirector, pipe: Any) -> "SafeGuidance":
        """The guider of a modular pipeline with the numbers of the one that it has. Raises HGRError for another family's HGR."""
        config = getattr(getattr(pipe, "guider", None), "config", {})
        names = ("guidance_scale", "guidance_rescale", "use_original_formulation", "start", "stop", "enabled")
        guider = cls(**{name: config[name] for name in names if name in config})
        guider.redirector, guider.pipe = redirector, pipe
        redirector.check(guider._denoiser(), pipe.scheduler)
        return guider

    def new(self, **kwargs: Any) -> "SafeGuidance":
        """A copy with other numbers, and with the same SafeCFG."""
        copy = super().new(**kwargs)
        copy.redirector, copy.pipe = self.redirector, self.pipe
        return copy

    def _denoiser(self) -> torch.nn.Module:
        return getattr(self.pipe, "unet", None) or self.pipe.transformer

    def _safecfg(self) -> Redirector:
        if self.redirector is None:
            raise HGRError("This SafeGuidance has no HGR. Make it with `protect(pipe, hgr)`.")
        return self.redirector

    def prepare_inputs(self, data: dict) -> list:  # type: ignore[override]  # it gets a dict; the base says BlockState
        redirector, data = self._safecfg(), dict(data)
        tokens = next((name for name in TOKENS if name in data), None)
        pooled = next((name for name in POOLED if name in data), None)
        if tokens is None:
            redirector.notice(f"this pipeline names its prompts {sorted(data)}: they are not redirected.")
            return super().prepare_inputs(data)
        first = lambda name: None if name is None else _pair(data[name])[0]  # noqa: E731
        given = first(tokens), first(pooled)
        if self._prompts[0] is not given[0]:  # once per run
            self._prompts = (*given, *redirector.prompts(*given))
        for name, safe in ((tokens, self._prompts[2]), (pooled, self._prompts[3])):
            if name is not None:
                data[name] = (safe, *_pair(data[name])[1:])
        return super().prepare_inputs(data)

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)

        def keep_input(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            self._x_in = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]

        self._hook = denoiser.register_forward_pre_hook(keep_input, with_kwargs=True)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        self._hook.remove()
        super().cleanup_models(denoiser)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        redirector = self._safecfg()
        if redirector.by_guidance and pred_uncond is None:
            redirector.notice(
                "this step has no negative (guidance_scale of 1, or outside of start and stop): it is not redirected."
            )
        elif redirector.by_guidance:
            family, edge = redirector.check(self._denoiser(), self.pipe.scheduler)
            x_in = family.unpack(self._x_in, None)
            pred_cond = redirector.outputs(edge, self.pipe.scheduler, self._timestep, pred_cond, pred_uncond, x_in)
        return super().forward(pred_cond, pred_uncond)


def _pair(values: Any) -> tuple:
    """(cond, uncond), or (cond,) where a pipeline gives no negative."""
    return values if isinstance(values, tuple) else (values,)
