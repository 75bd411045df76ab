"""The demo's autoencoder: 128-pixel pictures to 16x16 latents and back, without normalisation layers.

Stable Diffusion's KL layout normalises 32 groups of channels; at the width that two CPU cores can train, a group is one
channel, and the mean that carries a flat background's colour is lost. So this one is norm-free, and works at half
resolution and below: the finest level is a pixel shuffle.

Pictures are (B, 3, H, W) in [-1, 1]; latents (B, 4, H / 8, W / 8).
"""

import torch.nn.functional as F
from torch import Tensor, nn

LATENT_SCALE = 0.18215  # Stable Diffusion's: core's SD15 latent format multiplies by it, so raw latents are larger by its inverse
WIDTHS = (64, 96, 192)  # channels at 1/2, 1/4 and 1/8 of the picture's size


class Block(nn.Module):
    """x + two 3x3 convolutions; the second starts at zero."""

    def __init__(self, channels: int, ops):
        super().__init__()
        self.conv1 = ops.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = ops.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class Autoencoder(nn.Module):
    """Encoder and decoder; `ops` gives the layer classes (torch's own, or ComfyUI's casting ones)."""

    def __init__(self, ops=nn):
        super().__init__()
        fine, mid, coarse = WIDTHS
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), ops.Conv2d(12, fine, 3, padding=1), Block(fine, ops),
            nn.PixelUnshuffle(2), ops.Conv2d(4 * fine, mid, 1), Block(mid, ops), Block(mid, ops),
            nn.PixelUnshuffle(2), ops.Conv2d(4 * mid, coarse, 1), Block(coarse, ops), Block(coarse, ops),
            ops.Conv2d(coarse, 4, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            ops.Conv2d(4, coarse, 3, padding=1), Block(coarse, ops), Block(coarse, ops), Block(coarse, ops),
            ops.Conv2d(coarse, 4 * mid, 1), nn.PixelShuffle(2), Block(mid, ops), Block(mid, ops),
            ops.Conv2d(mid, 4 * fine, 1), nn.PixelShuffle(2), Block(fine, ops), Block(fine, ops),
            ops.Conv2d(fine, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> raw latents (B, 4, H / 8, W / 8) of standard deviation 1 / LATENT_SCALE."""
        return self.encoder(pictures)

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (B, 4, h, w) -> pictures (B, 3, 8 h, 8 w), about [-1, 1]."""
        return self.decoder(latents)
