"""A zoo of core's own networks, shrunk: random weights that listen to their prompts, and text encoders that name every word.

What is seen here is mechanics, not quality. `zoo_pictures.py` and `zoo_videos.py` have the sizes of every class of `comfy.supported_models`.
"""

import hashlib
import json
import os
import re
import runpy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from safecfg.nodes.host.families import latents_of, prediction_of
from safecfg.nodes.host.more_tokens import gather

from fakes import CPU, INFO

# By its path: a server's pack is the release, which has no benchmarks.
randomise = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "random_weights.py"))["randomise"]

FOUND: dict[str, dict] = {}  # what was seen per variant, for the counts and the table of models
# Variants whose network is another's in all that matters here: taken on the newest host, or with ZOO=all.
KIN = frozenset({
    "SD20", "SD21UnclipL", "SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B", "SDXL_instructpix2pix", "SV3D_u", "SV3D_p", "PixArtAlpha",
    "HunyuanDiT1", "FluxSchnell", "FluxInpaint", "HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V", "CosmosI2V", "CosmosI2VPredict2",
    "WAN22_I2V_A14B", "WAN21_FunControl2V", "WAN22_Camera", "WAN21_SCAIL", "CogVideoX_I2V", "CogVideoX_Inpaint", "WAN22_Animate",
})  # fmt: skip
NEWEST = hasattr(comfy.supported_models, "MiniMaxH3")
ALL = os.environ.get("ZOO") == "all"
FIXED = 7  # tokens of an encoder that pads every prompt


def note(variant: "Variant", **facts) -> None:
    """Keeps what was seen of a variant; with ZOO_OUT also as JSON in that file, for `python -m benchmarks.which_models`."""
    FOUND.setdefault(variant.name, {"class": variant.of or variant.name}).update(facts)
    if path := os.environ.get("ZOO_OUT"):
        Path(path).write_text(json.dumps(FOUND, indent=1))


def counts(refused: dict) -> list[str]:
    """The zoo in numbers, for the end of a test run."""
    if not FOUND:
        return []
    trained = [facts.get("gradient") for facts in FOUND.values()]
    good = sum(error is not None and error <= 0.1 for error in trained)
    there = [name for name in refused if hasattr(comfy.supported_models, name)]
    return [
        f"zoo: {len({facts['class'] for facts in FOUND.values()})} classes, {len(FOUND)} variants; gradient within 0.1 in {good}, fallback in "
        f"{sum(error is None or error > 0.1 for error in trained)}; {len(there)} classes refused with a reason"
    ]


@dataclass(frozen=True)
class Variant:
    """A shrunk model: what core's class is given, the shape of its latents, and what its text encoder makes of a prompt."""

    name: str
    config: dict
    shape: tuple[int, ...] | tuple[tuple[int, ...], ...]  # of one latent, or of the latents that core packs together
    width: int = 32  # of the tokens
    pooled: int = 0
    masked: bool = False  # the encoder gives attention masks
    fixed: bool = False  # all prompts have FIXED tokens
    extras: Callable[[torch.Generator, int], dict] = field(default=lambda generator, count: {})
    state: Callable[[], dict] = dict  # weights that core's class looks at while it is made
    one_by_one: bool = False  # core evaluates one row at a time
    by_prompt: bool = True  # its prompts have tokens that a condition redirector can change
    of: str = ""  # the class, where the variant has a name of its own

    @property
    def core_class(self):
        """Core's class; None on hosts without it."""
        return getattr(comfy.supported_models, self.of or self.name, None)

    @property
    def packed(self) -> bool:
        """Whether core packs several latents into one."""
        return isinstance(self.shape[0], tuple)


def build(variant: Variant):
    """A MODEL (CPU, fp32, frozen) of core's class with random weights. Skips the test for a variant that this host does not know."""
    config = dict(variant.config)
    for _ in range(12):
        try:
            return _build(replace(variant, config=config))
        except TypeError as error:  # an older host: what it has no argument for is off there
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None:
                raise
            if variant.of:  # what makes the variant may be just that
                pytest.skip(f"this host's {variant.of} has no {unknown[1]}")
            config.pop(unknown[1])
    raise AssertionError(f"{variant.name}: this host's network knows none of its arguments")


def _build(variant: Variant):
    torch.manual_seed(0)
    core = variant.core_class(dict(variant.config))
    new = "image_model" in variant.config or "audio_model" in variant.config or "stable_cascade_stage" in variant.config
    extra = core.unet_extra_config
    if new or variant.name in ("SD3", "AuraFlow"):
        core.unet_config = {key: value for key, value in core.unet_config.items() if key not in extra or key in variant.config}
        core.unet_config.update({key: value for key, value in variant.config.items() if key in extra})
    else:  # a UNet: core counts its heads itself
        core.unet_config.update({key: value for key, value in variant.config.items() if key in extra})
        core.unet_config.update(num_heads=4, num_head_channels=-1)
    core.set_inference_dtype(torch.float32, None)
    with torch.no_grad(), not_a_number_where_empty():
        model = core.get_model(variant.state(), "", device=CPU)
    randomise(model.diffusion_model, torch.Generator().manual_seed(1))
    model.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)


@contextmanager
def not_a_number_where_empty():
    """Core leaves some weights and buffers as the memory was: for `randomise` to find all of them, not those that look odd today."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # `torch.empty` is then filled; no algorithm runs here
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@torch.no_grad()
def _generator(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))


class Encoder:
    """A CLIP for a variant: a random vector per word, and as many tokens as words unless the variant's are padded."""

    def __init__(self, variant: Variant):
        self.variant = variant
        self.cond_stage_model, self.patcher = torch.nn.Identity(), SimpleNamespace(patches_uuid="")  # as core's, to tell it by

    def clone(self) -> "Encoder":
        return self

    def clip_layer(self, layer) -> None:
        """Its only layer stays."""

    def tokenize(self, text: str) -> list[str]:
        words = text.split()[:FIXED] if self.variant.fixed else text.split()
        return words + [""] * ((FIXED if self.variant.fixed else len(words) + 2) - len(words))

    def encode_from_tokens_scheduled(self, words: list[str]) -> list:
        """One entry, as core's encoders give it."""
        variant = self.variant
        tokens = torch.stack([torch.randn(variant.width, generator=_generator(word)) for word in words])[None]
        generator, extras = _generator(" ".join(words)), {"pooled_output": None}
        if variant.pooled:
            extras["pooled_output"] = torch.randn(1, variant.pooled, generator=generator)
        if variant.masked:
            extras["attention_mask"] = torch.ones(1, len(words), dtype=torch.long)
        return [[tokens, {**extras, **variant.extras(generator, len(words))}]]


def encode(variant: Variant, text: str) -> list:
    """The CONDITIONING of a prompt."""
    clip = Encoder(variant)
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def info_of(model, variant: Variant):
    """The metadata of an HGR for a model."""
    latent, facts = model.get_model_object("latent_format"), latents_of(model)
    token_width = gather({"cross_attn": encode(variant, "a")[0][0], **encode(variant, "a")[0][1]})[0].shape[-1]
    return replace(
        INFO, latent_format=type(latent).__name__, latent_channels=facts.latent_channels, latent_dimensions=facts.latent_dimensions,
        prediction=prediction_of(model.get_model_object("model_sampling")), token_width=token_width, pooled_width=variant.pooled,
    )  # fmt: skip


def latents(variant: Variant, count: int = 1, value: float | None = None):
    """Noise, or a value, in the shape of a variant's latents; nested ones where core packs several."""
    generator = torch.Generator().manual_seed(3)

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        shape = (count * shape[0], *shape[1:])
        return torch.randn(shape, generator=generator) if value is None else torch.full(shape, value)

    if not variant.packed:
        return make(variant.shape)
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([make(shape) for shape in variant.shape])


def flat(latent) -> torch.Tensor:
    """All values of a latent or of nested ones, (B, N)."""
    parts = latent.unbind() if getattr(latent, "is_nested", False) and not torch.is_tensor(latent) else [latent]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def guide(model, variant: Variant, positive: list, sampler=None, count: int = 1, cfg: float = 4.0, steps: int = 2):
    """A run of core's CFGGuider from the same noise; the finished latents."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, encode(variant, "plain"))
    guider.set_cfg(cfg)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    noise, empty = latents(variant, count), latents(variant, count, 0.0)
    sampler = comfy.samplers.sampler_object("euler") if sampler is None else sampler
    return guider.sample(noise, empty, sampler, sigmas, disable_pbar=True, seed=0)
