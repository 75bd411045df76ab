"""Inception-v3's features of pictures, for FID (arXiv 1706.08500): TensorFlow's network of 2015 and its resizing, by torch-fidelity.

torch-fidelity's own class downloads its weights or reads a pickle. Its blocks need neither, and torchvision puts them in order.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...hgr_models import HGRError, file_hash
from ..loader import frozen_patcher
from ..reporting.drawing import to_pil, to_tensor
from .classifiers import UNREADABLE, reason
from .file_judges import lacks_of, place_of
from .judges import Context, Entry
from .own_judges import loaded

NAME, PACKAGE = "fid", "torch_fidelity"
FILE = "inception-2015-12-05.safetensors"
SOURCE = "pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid, converted as the help page of SafeCFG Evaluate says,"
LICENCE = "Apache-2.0"
SIDE, CLASSES, WIDTH = 299, 1008, 2048  # pixels that the network sees; its outputs, which FID does not use; features

Embed = Callable[[Tensor], Tensor]


class Inception(torch.nn.Module):
    """The network. `forward`: pictures (B, 3, H, W) of whole numbers from 0 to 255 -> features (B, WIDTH)."""

    def __init__(self) -> None:
        from torch_fidelity import feature_extractor_inceptionv3 as parts
        from torchvision.models import Inception3

        super().__init__()
        no_auxiliary = None  # of training
        blocks = [parts.BasicConv2d, parts.InceptionA, parts.InceptionB, parts.InceptionC, parts.InceptionD, parts.InceptionE_1]
        self.network = Inception3(CLASSES, aux_logits=False, inception_blocks=[*blocks, no_auxiliary], init_weights=False)
        self.network.Mixed_7c = parts.InceptionE_2(WIDTH)  # it pools otherwise than the one before

    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes the weights of a file, and drops the layer that names classes. Raises RuntimeError for those of another network."""
        self.network.load_state_dict(weights)
        self.network.fc = torch.nn.Identity()

    def forward(self, pictures: Tensor) -> Tensor:
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resized

        return self.network((resized(pictures, size=(SIDE, SIDE), align_corners=False) - 128) / 128)


def embedder(path: Path) -> tuple[Embed, str]:
    """A function that gives the features (WIDTH,) of a picture (1, H, W, 3) in [0, 1], rounded to 8 bits as in its file; the weights' hash.

    Raises HGRError for a file that is damaged or of another network, and for a package that does not work.
    """
    try:
        network = Inception()
        network.load(load_file(path))
    except UNREADABLE as error:
        raise HGRError(
            f"FID cannot be computed with {path}: {reason(error)}. Convert the weights again, or take the file away to go on without FID."
        ) from error
    patcher = frozen_patcher(network.float())

    @torch.no_grad()
    def embed(picture: Tensor) -> Tensor:
        pixels = (to_tensor(to_pil(picture[0, ..., :3])) * 255).round().movedim(-1, 0)[None]
        module = loaded(patcher)
        return module(pixels.to(patcher.load_device))[0].float().cpu()

    return embed, file_hash(path)


def entry(context: Context) -> Entry:
    """FID's network among what this machine may have: `missing` names the file, its licence, its folder and the package."""
    place, lacking = place_of(NAME, context, (FILE,))
    return Entry(NAME, lacks_of(NAME, lacking, SOURCE, LICENCE, PACKAGE), lambda: embedder(place / FILE))


def why_not(fid: Entry) -> str:
    """A note on what FID lacks; "" where nothing."""
    if not fid.missing:
        return ""
    return f"FID is not computed: {fid.missing}. FD-CLIP and CMMD, of CLIP's features, are no FID."
