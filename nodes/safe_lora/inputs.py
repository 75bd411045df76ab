"""Prompts and pictures for a safe LoRA, as they come from widgets, sockets and files: strings and latents, nothing else."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor

from ... import hgr_models
from ...hgr_models.pairs import PromptSet


def gather_prompts(text: str, file: str, pairs: PromptSet | None, seed: int) -> tuple[str, ...]:
    """Every distinct prompt of a text and a file, one per line, and of prompt pairs, shuffled: who was whose partner is lost."""
    lines = [*text.splitlines(), *_lines_of(file)]
    if pairs is not None:
        lines += [prompt for pair in pairs.pairs for prompt in (pair.harmful, pair.safe)] + list(pairs.clean)
    found = sorted({line.strip() for line in lines if line.strip()})
    return tuple(random.Random(f"prompts {seed}").sample(found, len(found)))


def _lines_of(file: str) -> list[str]:
    if not file.strip():
        return []
    folder = Path(folder_paths.get_input_directory()).resolve()
    path = (folder / file.strip()).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise hgr_models.HGRError(f"Expected the name of a text file in {folder}, but got {file!r}. Put the file there.")
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise hgr_models.HGRError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8, one prompt per line.") from error


def gather_pictures(
    model: ModelPatcher,
    vae: VAE | None,
    images: Sequence[Tensor],
    latents: Sequence[dict],
    captions: Sequence[str],
    prompts: Sequence[str],
) -> list[tuple[Tensor, str]]:
    """(latent (1, C, *spatial), caption) of every picture. Without captions, the prompts take turns.

    Raises HGRError when there is no VAE for images, the captions are of another number, or latents are another model's.
    """
    if len(images) and vae is None:
        raise hgr_models.HGRError("Images are connected without a VAE. Connect the model's VAE, or connect latents instead.")
    found = [latent for part in _latents(vae, images, latents) for latent in part.cpu().split(1)]
    channels = model.get_model_object("latent_format").latent_channels
    if wrong := [tuple(latent.shape) for latent in found if latent.shape[1] != channels]:
        raise hgr_models.HGRError(
            f"Expected latents with {channels} channels, as this model has, but got {wrong[0]}. Connect the VAE of this model."
        )
    if captions and len(captions) != len(found):
        raise hgr_models.HGRError(
            f"Expected a caption for each of the {len(found)} pictures, but got {len(captions)}. Connect the texts that belong to them, or none."
        )
    captions = captions or [prompts[i % len(prompts)] if prompts else "" for i in range(len(found))]
    return list(zip(found, captions, strict=True))


def _latents(vae: VAE | None, images: Sequence[Tensor], latents: Sequence[dict]) -> Iterator[Tensor]:
    for picture in images:
        yield vae.encode(picture[..., :3])
    for latent in latents:
        yield latent["samples"]


def digest_of(prompts: Sequence[str], pictures: Sequence[tuple[Tensor, str]]) -> str:
    """SHA-256 of prompts, and of pictures with their captions."""
    digest = hashlib.sha256("\n".join(prompts).encode())
    for latent, caption in pictures:
        digest.update(caption.encode() + latent.float().numpy().tobytes())
    return digest.hexdigest()
