"""Last in every evaluation: what the sampler gets must not lie on the negative prompt's side of the positive prediction.

    g    = cond_denoised - uncond_denoised                  as SafeCFG hands them on, before any other node
    side = <denoised - cond_denoised, g> / |g|^2            (B,): cfg - 1 for plain CFG, never below 0 for a cfg of 1 or more

An operation on the guidance, a negative number, a guider with two scales: whatever turned the sign, `side` is below 0. Such a row
is read as the prompt that it draws: where the negative's text or the direction towards it is harmful, the row becomes
`cond_denoised`, as at cfg 1, for the rest of the run. Linear in the pixels, and no row of the model. Nothing is computed where
no other node has a hook: plain CFG keeps the rule by itself.
"""

import logging
import math
from dataclasses import dataclass

import comfy.utils
import torch
from torch import Tensor

from ... import hgr_models
from ..host.families import read_text
from ..host.hooks import CFG, POST_CFG, PRE_CFG, is_active
from ..host.packed_latents import Part, part_for
from ..host.settings import ApplySettings
from ..redirect.runs import patcher_of

STATE = "safecfg_enforced_run"  # in a run's model_options
TOLERANCE = 0.25  # of |g|: rounding, and nodes that scale the whole prediction down (RescaleCFG), are not yet the negative
CALC = "sampler_calc_cond_batch_function"

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Seen:
    """What SafeCFG handed on in an evaluation of x, and the negative's conditions; `uncond_denoised` None: nothing to guide away from."""

    x: Tensor
    cond_denoised: Tensor
    uncond_denoised: Tensor | None
    negative: list | None = None


@dataclass(eq=False)
class RunState:
    """What enforcement keeps for a run."""

    rising: bool = False  # its noise levels rise somewhere
    latent_shapes: tuple = ()
    seen: Seen | None = None
    flagged: Tensor | None = None  # rows (B,) whose negative was found harmful where it was drawn
    rows: int = 0  # evaluations that were put right
    plain: bool = True  # nothing but the positive prompts' text was drawn so far
    evaluations: int = 0


def make_hooks(settings: ApplySettings) -> dict:
    """Our hooks by list: (behind SafeCFG's own, last in the list)."""

    def watch(args: dict) -> list[Tensor]:
        outputs, conds = args["conds_out"], args["conds"]
        if (state := args["model_options"].get(STATE)) is not None:
            base = 2 if len(outputs) == 3 else 1
            negative = conds[base] if len(conds) > base else None
            there = negative is not None and len(outputs) > base and is_active(negative, args["sigma"])
            state.seen = Seen(args["input"], outputs[0], outputs[base] if there else None, negative)
        return outputs

    def watch_late(args: dict) -> Tensor:
        state = args["model_options"].get(STATE)
        if state is not None and (state.seen is None or state.seen.x is not args["input"]):  # a guider that skips pre_cfg
            there = is_active(args.get("uncond"), args["sigma"])
            # A copy: what SafeCFG redirected here is in the tensor that later hooks get.
            state.seen = Seen(
                args["input"], args["cond_denoised"].clone(), args["uncond_denoised"] if there else None, args.get("uncond")
            )
        return args["denoised"]

    def settle(args: dict) -> Tensor:
        state = args["model_options"].get(STATE)
        if state is None or (seen := state.seen) is None or seen.x is not args["input"]:
            return args["denoised"]
        state.seen, plain = None, _is_plain(args)
        state.plain, state.evaluations = state.plain and plain, state.evaluations + 1
        if seen.uncond_denoised is None or plain:
            return args["denoised"]
        return put_right(state, settings, seen, args)

    for hook in (watch, watch_late, settle):
        hook._safecfg_enforced = True  # type: ignore[attr-defined]
    return {PRE_CFG: (watch, None), POST_CFG: (watch_late, settle)}


def place(model_options: dict, hooks: dict) -> None:
    """Puts our hooks where they belong, once; SafeCFG's own are the first of their lists. {} takes them out."""
    for name in (PRE_CFG, POST_CFG):
        others = model_options.get(name, [])
        others = list(others) if isinstance(others, (list, tuple)) else [others]
        others = [hook for hook in others if not getattr(hook, "_safecfg_enforced", False)]
        first, last = hooks.get(name, (None, None))
        ahead = sum(1 for hook in others if getattr(hook, "_safecfg", False))
        model_options[name] = [*others[:ahead], *filter(None, [first]), *others[ahead:], *filter(None, [last])]


def _is_plain(args: dict) -> bool:
    """Whether nothing but SafeCFG has a hand in this evaluation, and its cfg is at least 1."""
    options = args["model_options"]
    ours = lambda hook: getattr(hook, "_safecfg", False) or getattr(hook, "_safecfg_enforced", False)  # noqa: E731
    if CFG in options or CALC in options or not all(map(ours, options.get(PRE_CFG, []))):
        return False
    before = options.get(POST_CFG, [])
    last = next((i for i, hook in enumerate(before) if getattr(hook, "__name__", "") == "settle" and ours(hook)), len(before))
    scale = args.get("cond_scale", math.nan)
    return all(map(ours, before[:last])) and isinstance(scale, (int, float)) and scale >= 1


def sides(denoised: Tensor, cond_denoised: Tensor, uncond_denoised: Tensor) -> tuple[Tensor, Tensor]:
    """<denoised - cond_denoised, g> and |g|^2, each (B,) in float32, of tensors (B, ...)."""
    rows = lambda t: t.float().flatten(1)  # noqa: E731
    direction = rows(cond_denoised) - rows(uncond_denoised)
    return ((rows(denoised) - rows(cond_denoised)) * direction).sum(dim=1), direction.square().sum(dim=1)


def put_right(state: RunState, settings: ApplySettings, seen: Seen, args: dict) -> Tensor:
    """`denoised` with the positive prediction in every row that draws a harmful negative; else as it came, to the last bit."""
    denoised, x = args["denoised"], args["input"]
    part = part_for(x, state.latent_shapes, settings.info)
    take = (lambda t: t) if part is None else part.take
    along, size = sides(take(denoised), take(seen.cond_denoised), take(seen.uncond_denoised))
    drawn = ~(along >= -TOLERANCE * size)  # NaN counts
    if not drawn.any():
        return denoised
    harmful = _harmful(settings, seen, args, part)
    state.flagged = (
        harmful if state.flagged is None or len(state.flagged) != len(harmful) else state.flagged.to(harmful.device) | harmful
    )
    wrong = drawn & state.flagged
    if not wrong.any():
        return denoised
    if not state.rows:
        logger.warning("SafeCFG (enforced): a node draws the negative prompt, which is harmful: drawn as at cfg 1 instead.")
    state.rows += 1
    shape = (-1, *[1] * (denoised.ndim - 1))
    return torch.where(wrong.view(shape), seen.cond_denoised.to(denoised), denoised)


def _harmful(settings: ApplySettings, seen: Seen, args: dict, part: Part | None) -> Tensor:
    """Rows (B,) whose negative is harmful: by its text, or by the direction that leads to it. True where nobody can tell."""
    x, model = seen.x, args["model"]
    patcher = patcher_of(model.current_patcher)
    everywhere = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if patcher is None:
        return everywhere
    by_text = _harmful_text(patcher.model, settings, seen.negative, len(x))
    by_direction = None
    if patcher.model.guidance is not None and part is not None:
        x_in, sigma = model.model_sampling.calculate_input(args["sigma"], x), args["sigma"].flatten()
        tensors = [part.take(t).to(patcher.load_device) for t in (seen.uncond_denoised, seen.cond_denoised, x_in)]
        tensors.append((sigma.expand(len(x)) if len(sigma) == 1 else sigma).to(patcher.load_device))
        found = hgr_models.redirect_guidance(patcher.model, *tensors, settings.categories)
        by_direction = (found.weights > 0).any(dim=1)
    known = [rows.to(x.device) for rows in (by_text, by_direction) if rows is not None]
    return everywhere if not known else torch.stack(known).any(dim=0)


def _harmful_text(network: hgr_models.HGR, settings: ApplySettings, negative: list[dict] | None, count: int) -> Tensor | None:
    """Rows (count,) whose negative's text is above a threshold; None where there is no text to read."""
    if network.condition is None:
        return None
    found = None
    for entry in negative or ():
        text, _ = read_text(entry, settings.info)
        if text is None:
            continue
        device = next(network.parameters()).device
        p = network.condition.harmfulness(*(None if t is None else t.to(device) for t in (text.tokens, text.pooled, text.mask)))
        harmful = ~(p <= network.condition_thresholds.to(p)).all(dim=1)
        rows = comfy.utils.repeat_to_batch_size(harmful[:, None].float(), count)[:, 0] > 0
        found = rows if found is None else found | rows
    return found
