"""Wrappers at the edge: models that predict noise, velocity, the picture or a flow, as the x0 predictions of the equations.

    x_in = a x0 + b noise        the network's own input: a^2 + b^2 = 1 with sigma = b / a, or a = 1 - sigma, b = sigma (FLOW)
    EPS   output = noise         x0 = (x_in - b output) / a
    V     output = a noise - b x0    x0 = a x_in - b output
    X0    output = x0
    FLOW  output = noise - x0    x0 = x_in - b output

The formulas of k-diffusion's `external.py` (Karras et al., arXiv 2206.00364), for a network's scaled input. ComfyUI's model
sampling classes of the same names give the same sigma and the same x0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import HGRError
from .hgr import Redirectors
from .redirection import CategorySettings, GuidanceResult, redirect_guidance
from .shapes import per_row

PREDICTIONS = ("EPS", "V", "X0", "FLOW")


@dataclass(frozen=True)
class Edge:
    """What a network predicts, one of PREDICTIONS. Raises HGRError for anything else."""

    prediction: str

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise HGRError(f"Expected a model that predicts one of {', '.join(PREDICTIONS)}, but got {self.prediction!r}.")

    def scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """a and b (B,), float32, at noise levels sigma (B,)."""
        sigma = sigma.float()
        if self.prediction == "FLOW":
            return 1 - sigma, sigma
        a = (sigma.square() + 1).rsqrt()
        return a, sigma * a

    def denoised(self, output: Tensor, x_in: Tensor, sigma: Tensor) -> Tensor:
        """The x0 prediction (B, C, *spatial), float32, of a network's output for its input x_in at noise levels sigma (B,)."""
        output, x_in = output.float(), x_in.float()
        a, b = (per_row(scale, x_in) for scale in self.scales(sigma))
        if self.prediction == "EPS":
            return (x_in - b * output) / a
        if self.prediction == "V":
            return a * x_in - b * output
        return output if self.prediction == "X0" else x_in - b * output

    def output_change(self, change: Tensor, sigma: Tensor) -> Tensor:
        """By how much an output changes where its x0 prediction changes by `change` (B, C, *spatial); 0 where b is 0."""
        if self.prediction == "X0":
            return change
        a, b = (per_row(scale, change) for scale in self.scales(sigma))
        factor = -a / b if self.prediction == "EPS" else -1 / b
        return torch.where(b > 0, factor * change, 0.0)


@torch.no_grad()
def redirect_outputs(
    hgr: Redirectors,
    edge: Edge,
    cond_output: Tensor,
    uncond_output: Tensor,
    x_in: Tensor,
    sigma: Tensor,
    settings: CategorySettings,
) -> tuple[Tensor, GuidanceResult]:
    """Redirects the guidance of a network's outputs (B, C, *spatial) for a prompt and for no prompt; the equations are those
    of `redirect_guidance`.

    Returns the output to use in place of `cond_output`, in its dtype and with unflagged rows to the last bit, and what was read.
    """
    cond, uncond = (edge.denoised(output, x_in, sigma) for output in (cond_output, uncond_output))
    result = redirect_guidance(hgr, cond, uncond, x_in.float(), sigma.float(), settings)
    change = edge.output_change(result.cond_denoised - cond, sigma)
    flagged = per_row((result.weights > 0).any(dim=1), cond_output)
    safe = torch.where(flagged, cond_output + change.to(cond_output.dtype), cond_output)
    return safe, result
