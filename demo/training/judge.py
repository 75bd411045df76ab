"""Trains the judge on rendered scenes, shifted and blurred, and on their autoencoder reconstructions."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange

from hgr_models.training import autocast, learning_rate

from .. import world
from ..autoencoder import Autoencoder
from ..files import WEIGHTS, load_module, pictures_to_tensor, save_weights
from ..judge import Judge

POOL = 3000  # reconstructions made beforehand: they cost more than a training step


def batch(count: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (count, 3, 128, 128) in [-1, 1] and labels (count, names); a tenth of the scenes is empty."""
    pictures, labels = [], torch.zeros(count, len(world.NAMES))
    for i in range(count):
        number = rng.choices((0, 1, 2), (0.1, 0.3, 0.6))[0]
        names = tuple(rng.sample(world.NAMES, number))
        scene = world.random_scene(names or (world.NAMES[0],), rng)
        pictures.append(world.render(scene if names else world.Scene((), (), scene.background, scene.brightness)))
        labels[i, [world.NAMES.index(n) for n in names]] = 1
    return pictures_to_tensor(np.stack(pictures)), labels


def augment(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Moves by up to 5 pixels, scales by up to 8 %, changes brightness, blurs a third, adds noise."""
    size = round(world.SIZE * rng.uniform(0.92, 1.08))
    x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    x = F.pad(x, (10, 10, 10, 10), mode="replicate")
    left, top = (rng.randint(0, x.shape[-1] - world.SIZE) for _ in "xy")
    x = x[..., top : top + world.SIZE, left : left + world.SIZE]
    if rng.random() < 0.33:
        x = F.avg_pool2d(x, 3, 1, 1)
    return x * rng.uniform(0.9, 1.1) + torch.randn_like(x) * rng.uniform(0, 0.08)


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, x: torch.Tensor, noise: float) -> torch.Tensor:
    z = autoencoder.encode(x)
    return autoencoder.decode(z + torch.randn_like(z) * z.std() * noise).clamp(-1, 1)


def reconstructions(autoencoder: Autoencoder, count: int, rng: random.Random, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes through the autoencoder, with some noise on the latent: pictures (count, 3, 128, 128) uint8, labels."""
    pictures, labels = [], []
    for _ in trange(0, count, 50, desc="reconstructions"):
        x, y = batch(50, rng)
        x = reconstruct(autoencoder, x.to(device), rng.uniform(0, 0.2))
        pictures.append(((x + 1) * 127.5).round().to(torch.uint8).cpu())
        labels.append(y)
    return torch.cat(pictures), torch.cat(labels)


@torch.no_grad()
def exact(judge: Judge, autoencoder: Autoencoder, rng: random.Random, count: int = 1024) -> dict[str, float]:
    """Shares of held-out scenes with exactly the right labels: renders, and their reconstructions."""
    right = {"exact": 0, "exact_reconstructed": 0}
    for _ in range(count // 64):
        x, y = batch(64, rng)
        for key, pictures in (("exact", x), ("exact_reconstructed", reconstruct(autoencoder, x, 0.0))):
            right[key] += int(((judge(pictures) > 0) == (y > 0)).all(dim=1).sum())
    return {k: v / count for k, v in right.items()}


def train(steps: int, device: str, seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    autoencoder = Autoencoder()
    load_module(autoencoder, "autoencoder")
    autoencoder.to(device)
    pool, pool_labels = reconstructions(autoencoder, POOL, rng, device)
    judge = Judge().to(device)
    optimiser = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    for step in (bar := trange(steps, desc="judge")):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, 3e-3)
        fresh, labels = batch(16, rng)
        picks = torch.randint(0, POOL, (16,))
        x = augment(torch.cat([fresh, pool[picks].float() / 127.5 - 1]).to(device), rng)
        y = torch.cat([labels, pool_labels[picks]]).to(device)
        with autocast(x.device):
            evidence = judge(x)
        loss = F.binary_cross_entropy_with_logits(evidence.float(), y, pos_weight=torch.tensor(2.0)) * 10
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    judge.cpu().train(False)
    error = exact(judge, autoencoder.cpu(), random.Random(seed + 1))
    save_weights(WEIGHTS / "judge.safetensors", judge.state_dict(), {"steps": steps, "seed": seed, **error})
