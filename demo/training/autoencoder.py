"""Trains the autoencoder on rendered scenes: mostly 64-pixel crops, whole pictures at the end."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange

from hgr_models.training import Averaged, autocast, learning_rate

from .. import world
from ..autoencoder import LATENT_SCALE, Autoencoder
from ..files import WEIGHTS, pictures_to_tensor, save_weights
from ..world import random_names

NOISE = 0.1  # of the latent's unit variance: makes the decoder forgive what the diffusion model gets slightly wrong


def batch(count: int, size: int, rng: random.Random) -> torch.Tensor:
    """Crops on the 8-pixel grid, (count, 3, size, size) in [-1, 1]."""
    crops = []
    for _ in range(count):
        picture = world.render(world.random_scene(random_names(rng), rng))
        x, y = (rng.randint(0, (world.SIZE - size) // world.CELL) * world.CELL for _ in "xy")
        crops.append(picture[y : y + size, x : x + size])
    return pictures_to_tensor(np.stack(crops))


@torch.no_grad()
def normalise(model: Autoencoder, rng: random.Random) -> None:
    """Folds the latent's deviation per channel into the convolutions beside it: raw latents of deviation 1 / LATENT_SCALE."""
    z = model.encode(batch(512, 128, rng))
    std = z.std((0, 2, 3)) * LATENT_SCALE
    last, first = model.encoder[-1], model.decoder[0]
    last.weight /= std[:, None, None, None]
    last.bias /= std
    first.weight *= std[None, :, None, None]


def train(steps: int, device: str, seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = Autoencoder().to(device)
    mean = Averaged(model, 0.998)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-4, betas=(0.9, 0.99))
    for step in (bar := trange(steps, desc="autoencoder")):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        x = (batch(16, 64, rng) if step < 0.8 * steps else batch(6, 128, rng)).to(device)
        with autocast(x.device):
            z = model.encode(x).float()
            y = model.decode(z + NOISE * torch.randn_like(z)).float()
        error = F.l1_loss(y, x)
        loss = error + F.mse_loss(y, x) + 1e-3 * ((z.square().mean() - 1).square() + z.mean((0, 2, 3)).square().sum())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        mean.update(model)
        if step % 20 == 0:
            bar.set_postfix(l1=f"{error.item():.4f}", z=f"{z.std().item():.2f}")
    model = mean.module.cpu()
    normalise(model, rng)
    x = batch(256, 128, random.Random(seed + 1))
    with torch.no_grad():
        error = F.l1_loss(model.decode(model.encode(x)), x).item()
    save_weights(WEIGHTS / "autoencoder.safetensors", model.state_dict(), {"steps": steps, "seed": seed, "l1_held_out": error})
