"""A VAE without weights, for any latent size."""

import torch


class Vae:
    """Latents are means of 8 x 8 pixels; remembers what it was given."""

    latent_channels = 4

    def __init__(self):
        self.seen = None

    def spacial_compression_encode(self):
        return 8

    def encode(self, pictures):
        assert pictures.shape[1] % 8 == 0 and pictures.shape[2] % 8 == 0 and pictures.shape[3] == 3
        self.seen = pictures
        means = torch.nn.functional.avg_pool2d(pictures.movedim(-1, 1), 8)
        return torch.cat([means, means.mean(dim=1, keepdim=True)], dim=1) * 4 - 2

    def decode(self, latents):
        return (latents[:, :3].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2) + 2) / 4
