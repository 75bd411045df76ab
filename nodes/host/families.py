"""What differs between model families: how a model is named, and which keys of a condition carry text."""

from dataclasses import dataclass

import comfy.model_sampling
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ... import hgr_models
from ...hgr_models.encoders import RELATED, EncoderPrint, distance_between
from . import known_hgrs
from .architecture import architecture_of, refuse_unprompted
from .more_tokens import BYT5, LLAMA, MASK, MORE, MT5, TOKENS, gather, keys_of

# Core's prediction classes, subclasses before their bases; some hosts lack some. The second name is a checkpoint's.
PREDICTIONS = (
    ("IMG_TO_IMG_FLOW", "IMG_TO_IMG_FLOW"),
    ("IMG_TO_IMG", "IMG_TO_IMG"),
    ("X0", "X0"),
    ("EDM", "EDM"),
    ("V_PREDICTION_DDPM", "V_DDPM"),
    ("V_PREDICTION", "V"),
    ("COSMOS_RFLOW", "COSMOS_FLOW"),
    ("CONST", "FLOW"),
    ("EPS", "EPS"),
)

# Formats of several latents, of which core names the widest: channels of the picture.
PICTURE_CHANNELS = {"MiniMaxH3AV": 24}

IMAGE_TO_IMAGE = frozenset({"IMG_TO_IMG", "IMG_TO_IMG_FLOW"})

# Keys of a condition that hold text which the condition redirector rewrites, in every family that has nothing more.
POOLED = "pooled_output"

# Keys that hold more text, and whose. A prompt that has one is not fully redirected: that is noticed.
OTHER_TEXT = {
    "conditioning_lyrics": "ACE-Step's lyrics",
    "cross_attn_controlnet": "the text a ControlNet reads",
    "deepstack": "Qwen's deep-stack embeddings",
    "deepstack_embeds": "Qwen's deep-stack embeddings",
    "gligen": "GLIGEN's boxes",
    "reference_latents_text_embeds": "the text of reference pictures",
    "sam3_multi_cond": "SAM3's prompts",
    "t5xxl_ids": "Anima's T5 token ids",
    "text_input_ids": "raw token ids",
}

# Keys that hold more text, which is redirected with the tokens.
MORE_TEXT = {LLAMA: "HiDream's Llama embeddings", MT5: "HunyuanDiT's mT5 embeddings", BYT5: "Hunyuan's ByT5 embeddings"}

# Keys that hold no text: places, times, sizes, pictures (the guidance redirector sees what those do).
NO_TEXT = frozenset(
    """
    aesthetic_score area aspect_ratio attention_mask_img_shape attention_mask_mt5xl audio_codes audio_embed audio_inject_scale
    augmentation_level azimuth camera_conditions clip_end_percent clip_start_percent clip_vision_output clip_vision_output_ref
    clip_vision_outputs concat_image concat_latent_image concat_mask concat_mask_index context_latents control
    control_apply_to_uncond control_video crop_h crop_w default degrade_sigma driving_mask_28ch elevation end_percent
    face_video_pixels fps frame_rate grid guidance guide_attention_entries guiding_frame_index height hooks keyframe_idxs
    lq_latent lyrics_strength mask mask_strength model_conds motion_bucket_id noise_augmentation noise_concat
    num_layers_stacked ofs pose_video_latent prompt_type ref_audio ref_latent ref_mask_28ch ref_mask_flag
    reference_audio_timbre_latents reference_latents reference_latents_method reference_motion seconds_start seconds_total
    set_area_to_bounds stable_cascade_prior start_percent strength t5xxl_weights target_height target_width time_dim_concat
    time_dim_replace timestep_end timestep_start unclip_conditioning unclip_noise_augment_merge unprocessed_ltxav_embeds uuid vace_frames vace_mask
    vace_strength visual_pos_masks width additional_models
    """.split()
)


@dataclass(frozen=True)
class Text:
    """A condition's text: tokens (B, T, D), pooled (B, P) or None, mask (B, T) or None."""

    tokens: Tensor
    pooled: Tensor | None
    mask: Tensor | None


def prediction_of(model_sampling: object) -> str:
    """The checkpoint's name for what a model predicts."""
    for name, ours in PREDICTIONS:
        kind = getattr(comfy.model_sampling, name, None)
        if kind is not None and isinstance(model_sampling, kind):
            return ours
    return type(model_sampling).__name__


def _describe(latent_format: str, channels: int, dimensions: int, prediction: str) -> str:
    return f"{latent_format} latents ({channels} channels, {dimensions}-D) with {prediction} prediction"


def family_of_model(model: ModelPatcher) -> str:
    """The family of a MODEL in words, from its own facts (a node may have patched its sampling or its latent format)."""
    latent, facts = model.get_model_object("latent_format"), latents_of(model)
    prediction = prediction_of(model.get_model_object("model_sampling"))
    return _describe(type(latent).__name__, facts.latent_channels, facts.latent_dimensions, prediction)


def family_of_hgr(info: hgr_models.HGRInfo) -> str:
    """The family that a checkpoint was trained for, in the same words; of one of prompts alone, its text encoder."""
    if info.of_prompts:
        encoder = info.encoder_print()
        return f"the text encoder {encoder.in_words() if encoder else f'of tokens {info.token_width} wide'}"
    return _describe(info.latent_format, info.latent_channels, info.latent_dimensions, info.prediction)


@dataclass(frozen=True)
class LatentFacts:
    """Channels and spatial dimensions of what a MODEL draws for the eye; of audio and video together, the video."""

    latent_channels: int
    latent_dimensions: int
    of_prompts: bool = False  # as `HGRInfo.of_prompts`: latents are known


def latents_of(model: ModelPatcher) -> LatentFacts:
    """What a MODEL draws, by its latent format."""
    latent = model.get_model_object("latent_format")
    channels = PICTURE_CHANNELS.get(type(latent).__name__, latent.latent_channels)
    return LatentFacts(channels, getattr(latent, "latent_dimensions", 2))


def refuse_image_to_image(model: ModelPatcher) -> None:
    """Raises HGRError for a MODEL that predicts one picture from another: no guidance leads there, so none can be redirected."""
    refuse_unprompted(model)
    if (prediction := prediction_of(model.get_model_object("model_sampling"))) in IMAGE_TO_IMAGE:
        raise hgr_models.HGRError(
            f"Expected a model that draws what a prompt says, but this one turns one picture into another ({prediction}): it has no "
            "guidance that SafeCFG could redirect. Judge its pictures with SafeCFG Detect Harm and another model instead."
        )


def check_family(model: ModelPatcher, info: hgr_models.HGRInfo) -> None:
    """Raises HGRError when a checkpoint does not fit a MODEL, or when none can."""
    refuse_image_to_image(model)
    if info.of_prompts:
        return  # it fits every model that reads its encoder: `read_text` compares widths, `check_encoder` the encoder itself
    wanted, found, name = family_of_hgr(info), family_of_model(model), architecture_of(model)
    if wanted == found and info.architecture in ("", name):
        return
    advice = "Load an HGR that was trained for this model, train one, or take SafeCFG Protect, which makes one."
    advice = " ".join(filter(None, (advice, known_for(model))))
    if wanted != found:
        trained_for = f"{info.architecture}, which has {wanted}" if info.architecture else f"a model of {wanted}"
        raise hgr_models.HGRError(f"This HGR was trained for {trained_for}, but this model is {name} and has {found}. {advice}")
    raise hgr_models.HGRError(
        f"This HGR was trained for {info.architecture}, but this model is {name}. Both have {found}, but they draw in ways of their "
        f"own. {advice}"
    )


def known_for(model: ModelPatcher, encoder: EncoderPrint | None = None) -> str:
    """Which HGRs are known for a MODEL, and its text encoder where that is known, in words; "" where none is."""
    name, family = architecture_of(model), family_of_model(model)
    base = base_of_model(model) if hasattr(model.model, "diffusion_model") else ""

    def fits(info: hgr_models.HGRInfo) -> bool:
        if info.of_prompts:
            made_with = info.encoder_print()
            return encoder is not None and made_with is not None and distance_between(encoder, made_with) < RELATED
        return family_of_hgr(info) == family and (info.base == base or info.architecture == name)

    return known_hgrs.in_words(fits, name, base, encoder)


def base_of_model(model: ModelPatcher) -> str:
    """The fingerprint of a MODEL's weights, without those that a LoRA or another patch changes."""
    patched = {str(key).removeprefix("diffusion_model.") for key in model.patches}
    # What another clone's LoRA has changed in the shared weights, as it was before.
    before = {str(key).removeprefix("diffusion_model."): kept.weight for key, kept in model.backup.items()}
    weights = readable_weights(model.model.diffusion_model)
    return hgr_models.fingerprint({k: before.get(k, v) for k, v in weights.items() if k not in patched})


def readable_weights(network: torch.nn.Module) -> dict[str, Tensor]:
    """A network's state; where a loader keeps weights packed and shows hollow ones in their place (GGUF), the packed ones."""
    weights, held = network.state_dict(), dict(network.named_parameters())
    found = {name: held.get(name) if value.is_meta else value for name, value in weights.items()}
    return {name: value.as_subclass(Tensor) for name, value in found.items() if value is not None and not value.is_meta}


def other_base(model: ModelPatcher, info: hgr_models.HGRInfo) -> str | None:
    """What to tell the user of a MODEL that is not the one an HGR was trained on; None when it is."""
    if not info.base or (base_of_model(model) == info.base and not model.patches):
        return None
    return (
        "this HGR was trained on another base of the same family, or without this LoRA: it may miss harm or touch clean pictures. "
        "SafeCFG Check HGR measures how well it fits, and can save thresholds that do."
    )


def read_text(condition: dict, info: hgr_models.HGRInfo) -> tuple[Text | None, list[str]]:
    """A condition's text (None: it has none), and what in it cannot be redirected, in words.

    Raises HGRError when the widths are another family's.
    """
    problems = [f"{OTHER_TEXT[key]} ({key})" for key in sorted(condition.keys() & OTHER_TEXT.keys())]
    problems += [
        f"{whose} ({key}) of an unknown shape"
        for key, whose in MORE_TEXT.items()
        if key in condition.keys() - set(keys_of(condition))
    ]
    unknown = condition.keys() - OTHER_TEXT.keys() - NO_TEXT - {TOKENS, POOLED, MASK, *MORE}
    problems += [f"the unknown key {key!r}" for key in sorted(map(str, unknown)) if _holds_tensors(condition.get(key))]
    tokens, pooled = (condition.get(key) for key in (TOKENS, POOLED))
    if tokens is None:
        return None, problems + (["a pooled vector without tokens"] if pooled is not None and info.pooled_width else [])
    if tokens.ndim != 3:
        return None, [*problems, f"tokens of shape {tuple(tokens.shape)}"]
    mask = condition.get(MASK)
    if mask is not None:
        mask = mask.reshape(-1, mask.shape[-1]) if mask.ndim else None
        if mask is None or mask.shape[1] != tokens.shape[1] or mask.shape[0] not in (1, tokens.shape[0]):
            problems.append("an attention mask that does not fit the tokens")
            mask = None
        else:
            mask = mask.expand(tokens.shape[0], -1)
    tokens, mask = gather({**condition, MASK: mask})
    return Text(tokens, _check_widths(tokens, pooled, info), mask), problems


def rows_shown(condition: dict, count: int) -> Tensor | None:
    """Which of `count` pictures a condition acts in, (count,) bool; None: in all. Its mask may leave some out, as Prompt Batch's do."""
    mask = condition.get("mask")
    if not isinstance(mask, Tensor) or mask.ndim < 3 or len(mask) != count or count == 1:
        return None
    return mask.flatten(1).any(dim=1)


def _check_widths(tokens: Tensor, pooled: Tensor | None, info: hgr_models.HGRInfo) -> Tensor | None:
    """The pooled vector that the checkpoint wants (None: it wants none); raises HGRError for another family's widths."""
    width = 0 if pooled is None else pooled.shape[-1]
    if tokens.shape[-1] != info.token_width or (info.pooled_width and width != info.pooled_width):
        raise hgr_models.HGRError(
            f"This HGR was trained for prompts of token width {info.token_width} and pooled width {info.pooled_width or 'none'} "
            f"({family_of_hgr(info)}), but this prompt has token width {tokens.shape[-1]} and pooled width {width or 'none'}. "
            "Load an HGR that was trained for this model, or connect the CLIP that belongs to the model."
        )
    return pooled if info.pooled_width else None


def _holds_tensors(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)
