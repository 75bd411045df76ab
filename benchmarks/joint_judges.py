"""Small random denoisers of core's own classes, most of which attend jointly to prompt and picture: judges of corrected tokens.

    ratio = sum |f(x, t, corrected) - f(x, t, partner)|^2 / sum |f(x, t, prompt) - f(x, t, partner)|^2

0 is the partner itself, 1 no redirection. Random weights draw nothing, but they read a prompt as their class does: as one set of
tokens with the picture's (Flux, Flux in its single blocks, Stable Diffusion 3), with the prompt's tokens at rotary places
(Qwen-Image, Lumina 2), or by cross-attention (Stable Diffusion 1.5).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.random_weights import randomise
from hgr_models.textspace import PairTexts

WIDTH = 128  # of the demo's tokens
SEEDS = (0, 1)  # of each class: one random network may be odd
TIMES = (0.9, 0.6, 0.3)  # of the noise level, 1 is noise alone
FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, vec_in_dim=24, context_in_dim=WIDTH, hidden_size=128, mlp_ratio=2.0, num_heads=1,
    depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False, txt_ids_dims=[],
)  # fmt: skip
SD3 = dict(
    in_channels=16, pos_embed_scaling_factor=None, depth=3, num_patches=4096, pos_embed_max_size=64, adm_in_channels=24, input_size=None,
    patch_size=2, context_size=WIDTH,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 192}},
)  # fmt: skip
QWEN = dict(
    image_model="qwen_image",
    in_channels=64,
    num_layers=3,
    attention_head_dim=128,
    num_attention_heads=1,
    joint_attention_dim=WIDTH,
)
LUMINA = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=96, cap_feat_dim=WIDTH, n_layers=3, qk_norm=True, n_heads=1, n_kv_heads=1,
    axes_dims=[32, 32, 32], axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=1.0, n_refiner_layers=1, multiple_of=32,
)  # fmt: skip
UNET = dict(
    image_size=32, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2], transformer_depth=[1, 1], transformer_depth_output=[1] * 4,
    transformer_depth_middle=1, use_linear_in_transformer=True, use_spatial_transformer=True, legacy=False, use_temporal_attention=False,
    out_channels=4, in_channels=4, context_dim=WIDTH,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A class of core's: its name there, what it is given, the shape of a latent, and whether it wants a pooled vector or a count."""

    core: str
    config: dict
    shape: tuple[int, ...]
    pooled: int = 0
    counted: bool = False  # it is told how many tokens the prompt has


KINDS = {
    "SD1.5 (cross)": Kind("SD15", UNET, (4, 8, 8)),
    "SD3": Kind("SD3", SD3, (16, 8, 8), 24),
    "Flux": Kind("Flux", FLUX, (16, 8, 8), 24),
    "Qwen-Image": Kind("QwenImage", QWEN, (16, 1, 8, 8)),
    "Lumina 2": Kind("Lumina2", LUMINA, (16, 8, 8), counted=True),
}


def make(kind: Kind, seed: int) -> torch.nn.Module:
    """A network of core's class with random weights that keep every layer's size and listen to the prompt."""
    import comfy.supported_models

    core = getattr(comfy.supported_models, kind.core)(dict(kind.config))
    extra = core.unet_extra_config
    if kind.core == "SD15":
        core.unet_config.update(num_heads=4, num_head_channels=-1)
    else:
        core.unet_config = {k: v for k, v in core.unet_config.items() if k not in extra or k in kind.config}
        core.unet_config.update({k: v for k, v in kind.config.items() if k in extra})
    core.set_inference_dtype(torch.float32, None)
    torch.use_deterministic_algorithms(True)  # not a number wherever core leaves a buffer as the memory was
    network = core.get_model({}, "", device=torch.device("cpu")).diffusion_model
    torch.use_deterministic_algorithms(False)
    randomise(network, torch.Generator().manual_seed(seed))
    return network.eval().requires_grad_(False)


class Judge:
    """One random network that looks at some pairs, each with noise of its own; units are a condition redirector's."""

    @torch.no_grad()
    def __init__(self, kind: Kind, seed: int, redirector, pairs: PairTexts):
        self.kind, self.network, self.pairs = kind, make(kind, seed), pairs
        self.noise = torch.randn(len(pairs), *kind.shape, generator=torch.Generator().manual_seed(7))
        self.center, self.scale = redirector.units(pairs.tokens)
        self.safe = [self.answer(pairs.partner_tokens, time) for time in TIMES]
        self.before = self._distance(pairs.tokens)

    def answer(self, tokens: Tensor, time: float) -> Tensor:
        """What the network makes of prompts (B, T, D), in units of their own spread, at a noise level."""
        count, tokens = len(tokens), (tokens - self.center) / self.scale
        more = {"y": torch.zeros(count, self.kind.pooled)} if self.kind.pooled else {}
        more |= {"num_tokens": tokens.shape[1], "attention_mask": None} if self.kind.counted else {}
        level = 1000 * time if self.kind.core in ("SD15", "SD3") else time
        return self.network(self.noise, torch.full((count,), level), context=tokens, **more)

    def _distance(self, tokens: Tensor) -> float:
        """Of the answers to prompts from those to the partners, over all noise levels."""
        found = [self.answer(tokens, time) - safe for time, safe in zip(TIMES, self.safe, strict=True)]
        return float(torch.stack([difference.square().sum() for difference in found]).sum())

    @torch.no_grad()
    def ratio(self, redirector) -> float:
        """The ratio of this module's first lines, of a condition redirector."""
        d_tokens, _ = redirector.delta(self.pairs.tokens, self.pairs.pooled, self.pairs.removed, self.pairs.mask)
        return self._distance(self.pairs.tokens + d_tokens) / self.before


def judges(redirector, pairs: PairTexts) -> dict[str, list[Judge]]:
    """Judges of some pairs by class; ComfyUI must have been started."""
    return {name: [Judge(kind, seed, redirector, pairs) for seed in SEEDS] for name, kind in KINDS.items()}


def ratios(found: dict[str, list[Judge]], redirector) -> dict[str, float]:
    """The mean ratio by class."""
    return {name: sum(judge.ratio(redirector) for judge in some) / len(some) for name, some in found.items()}
