"""Whether code that replaces core's sampling function uses what our hook gave it.

Such code may call the hooks of other nodes and then go on with its own tensors. With u the negative's prediction, g the guidance
and d what redirection added to it, a result that used it is about u + a g + b d with b = a; one that ignored it has b = 0.
"""

import numpy as np
import torch
from torch import Tensor

LEAST = 0.25  # of b / a; a pack's own scaling per channel or step changes it, ignoring it makes it 0
SMALL = 1e-6  # of |d|^2 / |g|^2: nothing was redirected


class Consistency:
    """Collects a few numbers per evaluation on the device; they are read when the run ends."""

    def __init__(self) -> None:
        self._returned: tuple[Tensor, Tensor, Tensor] | None = None  # u, cond_denoised before and after
        self._rows: list[Tensor] = []

    def returned(self, uncond_denoised: Tensor, before: Tensor, after: Tensor) -> None:
        """What our hook gave back in this evaluation."""
        self._returned = uncond_denoised, before, after

    def used(self, cond_denoised: Tensor) -> bool:
        """Whether a later hook was given the very tensor that ours returned: then nothing needs to be computed."""
        same = self._returned is not None and cond_denoised is self._returned[2]
        if same:
            self._returned = None
        return same

    @torch.no_grad()
    def add(self, denoised: Tensor) -> None:
        """The result (B, C, *spatial) that became of it."""
        if self._returned is None:
            return
        (u, before, after), self._returned = self._returned, None
        if not u.shape == before.shape == after.shape == denoised.shape:
            return
        g, d, r = ((t - o).float().flatten(1) for t, o in ((before, u), (after, before), (denoised, u)))
        products = ((g, g), (g, d), (d, d), (g, r), (d, r))
        self._rows.append(torch.stack([(p * q).sum(dim=1) for p, q in products], dim=1))

    def ignored(self) -> bool:
        """Whether a redirected picture came out of an evaluation as if it had not been. Waits for the device."""
        if not self._rows:
            return False
        gg, gd, dd, gr, dr = torch.cat(self._rows).double().cpu().numpy().T
        determinant = gg * dd - gd**2
        with np.errstate(all="ignore"):
            a, b = (gr * dd - dr * gd) / determinant, (gg * dr - gd * gr) / determinant
            # Where d lies along g, the two cannot be told apart.
            return bool(((dd > SMALL * gg) & (determinant > 1e-3 * gg * dd) & (b < LEAST * np.abs(a))).any())

    def clear(self) -> None:
        self._returned, self._rows = None, []
