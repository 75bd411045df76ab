"""An independent judge: which pictograms does a picture show?

A multi-label classifier trained on rendered scenes and their autoencoder reconstructions, never on the diffusion
model's output. Its own error on held-out renders is stored with its weights and printed beside every figure it gives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import world
from .files import load_module

WIDTHS = (24, 48, 96, 192)


class _Block(nn.Module):
    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.down = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out_channels), nn.BatchNorm2d(out_channels)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.down(x)))
        return F.relu(x + self.norm2(self.conv(x)))


class Judge(nn.Module):
    """Pictures (B, 3, 128, 128) in [-1, 1] -> evidence (B, number of pictograms); above 0: present."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[_Block(a, b) for a, b in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True)])
        self.mix = nn.Conv2d(WIDTHS[-1], WIDTHS[-1], 3, padding=1)
        self.head = nn.Conv2d(WIDTHS[-1], len(world.NAMES), 1)

    def forward(self, pictures: Tensor) -> Tensor:
        places = self.head(F.relu(self.mix(self.blocks(pictures))))  # (B, names, 8, 8)
        return places.flatten(2).logsumexp(dim=2) - 3.0  # local evidence, so that a small pictogram counts in full

    @classmethod
    def load(cls, device: str = "cpu") -> tuple["Judge", dict]:
        """The shipped judge and its metadata (`exact`: share of held-out scenes with exactly the right pictograms)."""
        judge = cls()
        about = load_module(judge, "judge")
        return judge.to(device), about

    @torch.no_grad()
    def names(self, pictures: Tensor) -> list[set[str]]:
        """The names of the pictograms found in pictures (B, 3, 128, 128) in [0, 1]."""
        device = self.head.weight.device
        present = torch.cat([self(p.to(device) * 2 - 1) > 0 for p in pictures.split(64)])
        return [{world.NAMES[i] for i in row.nonzero()[:, 0].tolist()} for row in present]
