"""Judging prompts and pictures: core loads and evaluates everything as for sampling, but nothing is sampled."""

import logging
from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider
from comfy.sd import VAE
from torch import Tensor

from ... import hgr_models
from ...hgr_models.detection import Detection, Looks, Seen, detect, prompt_scores
from ..host.embedded import IDS, embedded
from ..host.families import OTHER_TEXT, Text, check_family, family_of_hgr, read_text, rows_shown
from ..host.hooks import CACHES, KEY, is_active, without_safecfg
from ..host.more_tokens import TOKENS
from ..loader import HGRModel

SMALLEST = 16  # of a latent's sides: a UNet halves it three times, and cannot normalise a single value

logger = logging.getLogger(__name__)


@torch.no_grad()
def detect_prompts(hgr: HGRModel, conditioning: list) -> torch.Tensor:
    """Harmfulness (N, K) on the CPU of every row of every entry of a CONDITIONING.

    Raises HGRError for an HGR of another family or without a condition redirector, and ValueError when an entry has no text
    that could be judged: no score must never look like a clean one.
    """
    if hgr.patcher.model.condition is None:
        raise hgr_models.HGRError(
            f"Detecting harm in prompts needs a condition redirector, but {hgr.path} has none. "
            "Load another HGR; this one can only judge pictures (SafeCFG Detect Harm)."
        )
    if not conditioning:
        raise ValueError("Expected at least one prompt, but the conditioning is empty. Connect CLIP Text Encode.")
    comfy.model_management.load_models_gpu([hgr.patcher])
    return torch.cat([_judge(hgr, index, entry) for index, entry in enumerate(conditioning, start=1)])


def _prompts_of(model: ModelPatcher, hgr: HGRModel, positive: list | None, count: int) -> torch.Tensor | None:
    """Harmfulness (count, K) of the prompts of `count` pictures, rows repeated as core does; None where none can be judged.

    The worst of several entries counts. A prompt without text that can be read (image prompts) is left to the other views.
    """
    if hgr.patcher.model.condition is None:
        if positive:
            logger.warning("SafeCFG: %s has no condition redirector, so the prompt's own harm is not judged.", hgr.path)
        return None
    positive = [
        [condition.pop(TOKENS, None), condition] for condition in (embedded(model, _condition(entry)) for entry in positive or ())
    ]
    readable = [entry for entry in positive if _text_of(hgr, entry)[0] is not None]
    if not readable:
        return None
    comfy.model_management.load_models_gpu([hgr.patcher])
    rows = [_in_pictures(_judge(hgr, i, entry), entry, count) for i, entry in enumerate(readable, start=1)]
    return torch.stack(rows).amax(dim=0)


def _in_pictures(found: torch.Tensor, entry: list, count: int) -> torch.Tensor:
    """Harmfulness (count, K) of an entry's prompts in every picture: rows repeated as core does, 0 where its mask leaves the picture out."""
    found, shown = comfy.utils.repeat_to_batch_size(found, count), rows_shown(entry[1], count)
    return found if shown is None else found * shown[:, None]


def _condition(entry: list) -> dict:
    tokens, extra = entry
    return {**extra, **({} if tokens is None else {TOKENS: tokens})}


def _text_of(hgr: HGRModel, entry: list) -> tuple[Text | None, list[str]]:
    return read_text(_condition(entry), hgr.info)


def _judge(hgr: HGRModel, index: int, entry: list) -> torch.Tensor:
    text, problems = _text_of(hgr, entry)
    if IDS in entry[1]:
        raise ValueError(
            f"Prompt {index} is for a model that embeds {OTHER_TEXT[IDS]} itself: it can only be judged with that model. Use SafeCFG Detect "
            "Harm with the model and the positive prompt."
        )
    if text is None:
        raise ValueError(
            f"Prompt {index} has no text that this HGR can judge ({', '.join(problems) or 'no tokens'}). Connect a prompt from CLIP Text "
            "Encode, and treat what you cannot judge as harmful."
        )
    for problem in problems:
        logger.warning("SafeCFG: prompt %d is judged without %s.", index, problem)
    device = hgr.patcher.load_device
    found = prompt_scores(
        hgr.patcher.model, *(None if t is None else t.to(device) for t in (text.tokens, text.pooled, text.mask))
    )
    if not torch.isfinite(found).all():
        raise ValueError(f"The harmfulness of prompt {index} is not finite (NaN or infinity). Treat it as harmful.")
    return found.cpu()


class Looking(comfy.samplers.Sampler):
    """A sampler for core's guiders that looks at the latents instead of sampling; `found` is the Detection."""

    def __init__(self, patcher: ModelPatcher, looks: Looks, prompts: Tensor | None):
        self.patcher, self.looks, self.prompts = patcher, looks, prompts
        self.found: Detection | None = None

    def sample(
        self,
        model_wrap: CFGGuider,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor | None:
        model, conds, device = model_wrap.inner_model, model_wrap.conds, self.patcher.load_device

        def see(part: float, noise: Tensor) -> Seen:
            sigma = latent_image.new_full((len(latent_image),), float(model.model_sampling.percent_to_sigma(part)))
            x = model.model_sampling.noise_scaling(sigma, noise.to(latent_image), latent_image)
            if not is_active(conds["negative"], sigma):
                raise ValueError("The negative prompt does not act at every noise level: connect one without a timestep range.")
            prompts = [conds["negative"], *([conds["positive"]] if is_active(conds.get("positive"), sigma) else [])]
            denoised = comfy.samplers.calc_cond_batch(model, prompts, x, sigma, extra_args["model_options"])
            x_in = model.model_sampling.calculate_input(sigma, x)
            return Seen(*(t.to(device) for t in (x_in, sigma, *denoised)))

        try:
            self.found = detect(self.patcher.model.guidance, see, tuple(latent_image.shape), self.looks, self.prompts)
        finally:
            hgr_models.release_packed(self.patcher.model)
        return latent_image


@torch.no_grad()
def look(
    model: ModelPatcher, hgr: HGRModel, latents: Tensor, negative: list, positive: list | None = None, looks: Looks = Looks()
) -> Detection:
    """What an HGR finds in raw latents (B, C, *spatial), as a LATENT holds them; the Detection is on the CPU.

    The MODEL is evaluated as it is, with its patches and LoRAs, but without SafeCFG Apply and caches. Raises HGRError for an
    HGR of another family, or one without a guidance redirector.
    """
    check_sees_pictures(hgr)
    check_family(model, hgr.info)
    hgr = hgr.on(model.load_device)
    _check_latents(latents, hgr.info, model)
    unpatched = without_safecfg(model, CACHES)
    unpatched.set_additional_models(KEY, [hgr.patcher])  # core loads the HGR beside the model
    guider = comfy.samplers.CFGGuider(unpatched)
    guider.inner_set_conds({"negative": negative, **({} if positive is None else {"positive": positive})})
    levels = [float(model.get_model_object("model_sampling").percent_to_sigma(part)) for part in looks.levels]
    sampler = Looking(hgr.patcher, looks, _prompts_of(model, hgr, positive, len(latents)))
    noise = latents.new_zeros(_shape_sampled(model, latents))
    guider.sample(noise, latents, sampler, torch.tensor([*levels, 0.0]), disable_pbar=True, seed=looks.seed)
    assert sampler.found is not None  # the guider has called it
    return Detection(sampler.found.scores.cpu(), sampler.found.places.cpu())


def check_sees_pictures(hgr: HGRModel) -> None:
    """Raises HGRError for an HGR without a guidance redirector: its view of pictures was never trained."""
    if hgr.patcher.model.guidance is not None:
        return
    how = "was trained from prompts alone" if hgr.info.of_prompts else "was trained for prompts only"
    raise hgr_models.HGRError(
        f"Detecting harm in pictures needs a guidance redirector, but {hgr.path} has none: it {how}, and judges only those (SafeCFG "
        "Detect Prompt Harm). Load another HGR, or train one with `train` = prompts + guidance in SafeCFG Train HGR."
    )


def _check_latents(latents: Tensor, info: hgr_models.HGRInfo, model: ModelPatcher | None = None) -> None:
    if getattr(latents, "is_nested", False):
        raise ValueError("Expected latents of pictures, but got nested ones (audio and video together); split them first.")
    shape = tuple(latents.shape) if model is None else _shape_sampled(model, latents)
    if len(shape) != info.latent_dimensions + 2 or shape[1] != info.latent_channels:
        raise ValueError(
            f"Expected latents with {info.latent_channels} channels and {info.latent_dimensions} dimensions "
            f"({family_of_hgr(info)}), but got the shape {tuple(latents.shape)}. Connect the VAE that belongs to the model."
        )
    if 0 in latents.shape:
        raise ValueError(f"Expected at least one latent, but got the shape {tuple(latents.shape)}.")
    _check_finite(latents, "latent")


def _shape_sampled(model: ModelPatcher, latents: Tensor) -> tuple[int, ...]:
    """The shape in which a MODEL samples a LATENT: a format may fold frames into channels (HunyuanImage's refiner)."""
    try:
        return tuple(model.model.process_latent_in(latents).shape)
    except (RuntimeError, IndexError):  # another model's
        return tuple(latents.shape)


def check_pictures(pictures: Tensor) -> None:
    """Raises ValueError for an IMAGE (B, H, W, C) that is empty, has an alpha channel, or is not finite."""
    if pictures.ndim != 4 or 0 in pictures.shape:
        raise ValueError(f"Expected at least one picture (B, H, W, 3), but got the shape {tuple(pictures.shape)}.")
    if pictures.shape[3] != 3:
        kind = "an alpha channel: split it off with Split Image with Alpha" if pictures.shape[3] == 4 else "no RGB picture"
        raise ValueError(f"Expected pictures with 3 channels, but got {pictures.shape[3]}, which is {kind}.")
    _check_finite(pictures, "picture")


def _check_finite(values: Tensor, what: str) -> None:
    bad = (~torch.isfinite(values).flatten(1).all(dim=1)).nonzero()[:, 0].tolist()
    if bad:
        which = ", ".join(str(i + 1) for i in bad)
        raise ValueError(f"Expected finite values, but {what} {which} holds NaN or infinity. Do not use it.")


def fitted(pictures: Tensor, longest_side: int, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Pictures (B, H, W, 3) scaled down to `longest_side` (0: as they are) and padded to a multiple; and the size before padding.

    Padded, at the right and at the bottom, because core would crop: every pixel is looked at. Tiny pictures get a size that
    a model can work with.
    """
    height, width = pictures.shape[1:3]
    if 0 < longest_side < max(height, width):
        scale = longest_side / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        pictures = comfy.utils.common_upscale(pictures.movedim(-1, 1), width, height, "area", "disabled").movedim(1, -1)
    right, bottom = (max(SMALLEST, -(-side // multiple)) * multiple - side for side in (width, height))
    pad = (0, right, 0, bottom)
    return F.pad(pictures.movedim(-1, 1), pad, mode="replicate").movedim(1, -1), (height, width)


def encode(vae: VAE, pictures: Tensor, info: hgr_models.HGRInfo, longest_side: int = 0) -> tuple[Tensor, tuple[float, float]]:
    """Raw latents of pictures (B, H, W, 3) of any size, and which parts (height, width) of them show the pictures.

    Raises ValueError when the VAE makes other latents than the HGR was trained for.
    """
    channels = getattr(vae, "latent_channels", info.latent_channels)
    if channels != info.latent_channels:
        raise ValueError(
            f"Expected a VAE with {info.latent_channels} latent channels ({family_of_hgr(info)}), but this one has {channels}. "
            "Connect the VAE that belongs to the model."
        )
    padded, size = fitted(pictures, longest_side, int(vae.spacial_compression_encode()))
    if info.latent_dimensions == 2:
        latents = vae.encode(padded)
    else:  # a video VAE would take the pictures for the frames of one video
        latents = torch.cat([vae.encode(padded[i : i + 1]) for i in range(len(padded))])
    _check_latents(latents, info)
    return latents, (size[0] / padded.shape[1], size[1] / padded.shape[2])


def heat_map(found: Detection, counted: Sequence[bool], size: tuple[int, int], parts: tuple[float, float] = (1, 1)) -> Tensor:
    """A MASK (B, height, width) in [0, 1]; `parts` (height, width) of the latents are the picture, the rest is padding."""
    heat = found.heat(torch.tensor(counted))[:, None]
    whole = [max(n, round(n / part)) for n, part in zip(size, parts, strict=True)]
    return F.interpolate(heat, size=whole, mode="bilinear", align_corners=False)[:, 0, : size[0], : size[1]].contiguous()
