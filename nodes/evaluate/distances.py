"""How far two sets of pictures are apart, by the features of a CLIP vision model.

    FD-CLIP = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2)          as FID, but of CLIP's image embeddings (arXiv 2203.06026)
    CMMD = 1000 MMD^2, Gaussian kernel of sigma 10                of normalised embeddings; not biased by few pictures (arXiv 2401.09603)

FID proper is made from the features of an Inception network that neither ComfyUI nor this pack has: it is not computed here.
"""

import torch
from torch import Tensor

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
ROWS = 512  # of pairs at a time
NO_FID = (
    "FID is not computed: it needs the pool features of Inception-v3 (pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid, "
    "Apache-2.0), a pickle, which SafeCFG does not read from any folder. Keep all pictures and run such a program on them; FD-CLIP and CMMD, "
    "of CLIP's features, stand here instead and are no FID."
)


def frechet(one: Tensor, other: Tensor) -> float | None:
    """Fréchet distance of two sets of features (N, D) and (M, D), taken for normal; None where a set has fewer than two."""
    if min(len(one), len(other)) < 2:
        return None
    one, other = one.double(), other.double()
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (one, other)]
    # The trace of (S1 S2)^1/2 is the sum of the singular values of C1 C2^T, whose size is that of the sets.
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    spread = sum(x.square().sum() for x in centred)
    return max(0.0, float((one.mean(0) - other.mean(0)).square().sum() + spread - 2 * cross))


def few(rows: list[dict], width: int) -> str:
    """A note where FD-CLIP was made from too few pictures for features `width` wide; "" else. rows: of `figures.clean_rows`."""
    fewest = min((row["n"] for row in rows if row.get("fd_clip") is not None), default=width)
    if fewest >= width:
        return ""
    return (
        f"FD-CLIP comes from {fewest} pictures, fewer than CLIP's {width} features: it is too large by an amount that depends on their number. "
        "Compare it within one row of prompts only, or look at CMMD, whose bias is far smaller."
    )


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


def of_records(plain: list[dict], other: list[dict]) -> dict:
    """FD-CLIP and CMMD of the pictures of two arms, by the features that their records hold; {} where there are none."""
    sets = [[torch.tensor(r["features"]) for r in records if r.get("features")] for records in (plain, other)]
    if not all(sets):
        return {}
    one, two = map(torch.stack, sets)
    return {"fd_clip": frechet(one, two), "cmmd": cmmd(one, two)}
