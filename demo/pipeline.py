"""The demo model as one object: prompts to tokens, tokens to latents, latents to pictures."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .autoencoder import LATENT_SCALE, Autoencoder
from .files import load_module
from .sampling import scale_input, timestep_of
from .text_encoder import TextEncoder
from .unet import UNet, UNetConfig
from .words import Vocabulary, chunks, tokenize

LATENT_SHAPE = (4, 16, 16)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """`--device` of a command: where its networks run."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best, metavar="NAME", help=f"where the networks run: cpu or cuda (here: {best})")


@dataclass
class DemoModel:
    """Frozen networks of the demo world; load them with `DemoModel.load()`."""

    vocabulary: Vocabulary
    text_encoder: TextEncoder
    unet: UNet
    autoencoder: Autoencoder

    @classmethod
    def load(cls, device: str = "cpu") -> "DemoModel":
        vocabulary = Vocabulary.load()
        text_encoder = TextEncoder(len(vocabulary.words))
        text_encoder.vectors.copy_(vocabulary.vectors)
        unet, autoencoder = UNet(UNetConfig()), Autoencoder()
        for module, name in ((text_encoder, "text_encoder"), (unet, "unet"), (autoencoder, "autoencoder")):
            load_module(module, name)
            module.to(device)
        return cls(vocabulary, text_encoder, unet, autoencoder)

    @property
    def device(self) -> torch.device:
        return self.unet.out[2].weight.device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> tokens (B, T, 128) float32; all must need the same number of chunks of 16 tokens."""
        ids = self.vocabulary.ids()
        rows = [chunks(tokenize(prompt, ids)) for prompt in prompts]
        if len({len(r) for r in rows}) > 1:
            raise ValueError(
                "Expected prompts of the same number of 16-token chunks in one batch; encode longer prompts on their own."
            )
        flat = torch.tensor([c for r in rows for c in r], device=self.device)
        return self.text_encoder(flat).reshape(len(rows), -1, self.unet.config.context_dim)

    def denoised(self, x: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """x0 prediction for noisy latents x (B, 4, H, W), noise levels sigma (B,) and tokens (B, T, 128)."""
        eps = self.unet(scale_input(x, sigma), timestep_of(sigma), tokens)
        return x - sigma.view(-1, 1, 1, 1) * eps

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Unit-variance latents (B, 4, h, w) -> pictures (B, 3, 8 h, 8 w) float32 in [0, 1]."""
        return ((self.autoencoder.decode(latents / LATENT_SCALE) + 1) / 2).clamp(0, 1)
