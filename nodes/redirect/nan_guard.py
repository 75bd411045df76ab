"""NaN and infinity from an HGR: they stop the run, strict or not. What nothing is known about is never a picture.

While a run goes on, such a reading counts as harmful (`hgr_models.category_weights`), so that no step waits for the host. The
error comes where the readings are fetched: for prompts before the first step, for the guidance before the run returns.
"""

import torch
from torch import Tensor

from ..host.hooks import SafeCFGError
from .others import others_of
from .runs import Run

WHAT_TO_DO = (
    "Load another HGR, or train this one again. If the model or its CLIP runs in half precision, start ComfyUI with --force-fp32 "
    "(--fp32-text-enc): what they give the HGR may have overflowed."
)


def unreadable_prompt(run: Run, role: str, what: str) -> SafeCFGError:
    """The error for a prompt of the guider's `role` whose `what` is not finite."""
    return _error(run, f"gave the {role} prompt a {what}")


def check_readings(run: Run) -> None:
    """Raises SafeCFGError when the guidance redirector gave values that are not finite, of guidance that was."""
    if (what := run.readings.first_not_finite()) in ("harmfulness", "redirection"):
        raise _error(run, f"gave the guidance a {what}")


def check_run(run: Run, output: Tensor) -> None:
    """Looks at a run's readings and its latents (B, C, *spatial) before anybody gets them.

    Raises SafeCFGError for values of the HGR that are not finite, and for a picture that came out of a model whose own output
    was not. A picture that is itself not finite shows nothing: it is noticed.
    """
    check_readings(run)
    finite = torch.isfinite(output).flatten(1).all(dim=1).cpu().numpy()
    if (run.readings.unread(len(output)) & finite).any():
        raise SafeCFGError(
            f"SafeCFG: {_maker(run)} was not finite (NaN or infinity) at a step of this run, so {run.settings.hgr_name} could not judge it. "
            f"{_what_to_do(run)}"
        )
    if not finite.all():
        run.notice(
            f"the latents of this run are not finite (NaN or infinity), most likely because {_maker(run)} was not; do not use the picture. "
            f"{_what_to_do(run)}"
        )


def _others(run: Run) -> str:
    return ", ".join(others_of(getattr(run.guider, "model_options", None), run.guider, run.sampler))


def _maker(run: Run) -> str:
    """Whose values are not finite: the model's, unless others had their hands on them."""
    others = _others(run)
    return f"what the model and other nodes on its path ({others}) gave" if others else "the model's own output"


def _what_to_do(run: Run) -> str:
    first = "Try without those nodes; else run" if _others(run) else "Run"
    return f"{first} the model in another precision (start ComfyUI with --force-fp32, or load it as bf16)."


def _error(run: Run, did: str) -> SafeCFGError:
    return SafeCFGError(
        f"SafeCFG: {run.settings.hgr_name} {did} that is not finite (NaN or infinity), so nothing is known about this picture: the run "
        f"stops. {WHAT_TO_DO}"
    )
