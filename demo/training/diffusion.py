"""Trains the denoiser together with the text encoder: epsilon prediction, min-SNR-5 weights (arXiv 2303.09556)."""

import random
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm, trange

from hgr_models.training import Averaged, autocast, learning_rate

from .. import world
from ..autoencoder import LATENT_SCALE, Autoencoder
from ..files import WEIGHTS, load_module, pictures_to_tensor, save_weights
from ..sampling import SIGMAS, scale_input
from ..text_encoder import TextEncoder
from ..unet import UNet, UNetConfig
from ..words import Vocabulary, chunks, tokenize
from ..world import random_names

SCENES, BATCH, DROPPED_CAPTIONS = 24_000, 32, 0.12


@torch.no_grad()
def latents_of_scenes(count: int, device: str, rng: random.Random) -> tuple[Tensor, list[world.Scene]]:
    """Random scenes as unit-variance latents (count, 4, 16, 16) float32."""
    autoencoder = Autoencoder().to(device)
    load_module(autoencoder, "autoencoder")
    scenes = [world.random_scene(random_names(rng), rng) for _ in range(count)]
    latents = []
    for i in trange(0, count, 64, desc="scenes"):
        pictures = pictures_to_tensor(np.stack([world.render(s) for s in scenes[i : i + 64]])).to(device)
        with autocast(pictures.device):
            latents.append(autoencoder.encode(pictures).float() * LATENT_SCALE)
    return torch.cat(latents), scenes


def caption_ids(scenes: list[world.Scene], ids: dict[str, int], rng: random.Random) -> Tensor:
    """Token ids (B, CONTEXT) of a fresh caption for each scene, or of the empty prompt."""
    texts = ["" if rng.random() < DROPPED_CAPTIONS else world.caption(s.names, rng, s.background) for s in scenes]
    return torch.tensor([chunks(tokenize(t, ids))[0] for t in texts])


def weighted_error(unet: UNet, latents: Tensor, tokens: Tensor) -> Tensor:
    """Min-SNR-5 weighted squared error of the predicted noise at random timesteps."""
    timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
    sigma = SIGMAS.to(latents.device)[timesteps]
    noise = torch.randn_like(latents)
    x = scale_input(latents + noise * sigma.view(-1, 1, 1, 1), sigma)
    with autocast(latents.device):
        predicted = unet(x, timesteps, tokens)
    snr = sigma**-2
    return ((predicted.float() - noise).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()


def save(unet: UNet, text_encoder: TextEncoder, about: dict) -> None:
    save_weights(WEIGHTS / "unet.safetensors", unet.state_dict(), {**about, "config": unet.config.as_dict()})
    tensors = {k: v for k, v in text_encoder.state_dict().items() if k != "vectors"}
    save_weights(WEIGHTS / "text_encoder.safetensors", tensors, about)


def train(steps: int, device: str, seed: int, resume: bool = False) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vocabulary = Vocabulary.load()
    ids = vocabulary.ids()
    unet, text_encoder = UNet(UNetConfig()).to(device), TextEncoder(len(ids))
    text_encoder.vectors.copy_(vocabulary.vectors)
    before = 0
    if resume:
        before = load_module(unet, "unet")["steps"]
        load_module(text_encoder, "text_encoder")
        unet.train().requires_grad_(True)
        text_encoder.train().requires_grad_(True)
    text_encoder.to(device)
    means = Averaged(unet), Averaged(text_encoder)
    latents, scenes = latents_of_scenes(SCENES, device, rng)
    optimiser = torch.optim.AdamW(
        chain(unet.parameters(), text_encoder.parameters()), weight_decay=1e-2, betas=(0.9, 0.99), fused=True
    )
    for step in (bar := tqdm(range(steps), desc="diffusion")):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, 8e-4)
        picks = torch.randint(0, SCENES, (BATCH,))
        tokens = text_encoder(caption_ids([scenes[i] for i in picks.tolist()], ids, rng).to(device))
        loss = weighted_error(unet, latents[picks.to(device)], tokens)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chain(unet.parameters(), text_encoder.parameters()), 1.0)
        optimiser.step()
        for mean, module in zip(means, (unet, text_encoder), strict=True):
            mean.update(module)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if step % 500 == 499 or step == steps - 1:
            save(means[0].module, means[1].module, {"steps": before + step + 1, "seed": seed})
