"""What a safe LoRA does, for people: curves, clean prompts before and after, and a report."""

from collections.abc import Sequence
from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from PIL import Image, ImageDraw
from torch import Tensor

from ...hgr_models.train_lora import Change
from ..host.encoding import encode_each
from ..reporting.drawing import COLOURS, INK, MARGIN, PAPER, ROW, font, to_tensor
from ..training.curves import BLOCK, LEFT, WIDTH, Line, plot
from ..training.recorder import RunSettings, empty_latent

PREVIEW_STEPS = 20
ERRORS = {"error": "flagged samples, to the safe target", "quiet": "what the HGR leaves alone", "empty": "the empty prompt"}


def draw_curves(history: list[dict], name: str) -> Image.Image:
    """Loss and errors over the steps; empty before training begins."""
    canvas = Image.new("RGB", (LEFT + WIDTH + 2 * MARGIN, 2 * BLOCK + (len(ERRORS) + 2) * ROW), PAPER)
    pen, step = ImageDraw.Draw(canvas), f"step {history[-1]['step']}" if history else "not begun"
    pen.text((MARGIN, MARGIN), f"SafeCFG Fine-tune Safe LoRA: {name}", INK, font(18))
    errors = [Line(text, [e[key] for e in history if e[key] is not None]) for key, text in ERRORS.items()]
    for row, (title, lines) in enumerate(
        ((f"loss ({step})", [Line("loss", [e["loss"] for e in history])]), ("squared errors", errors))
    ):
        plot(pen, (MARGIN + LEFT, 4 * ROW + row * BLOCK), title, lines, legend=False)
    for i, text in enumerate(ERRORS.values()):
        pen.text((MARGIN, 2 * BLOCK + (i + 1) * ROW + ROW // 2), text, COLOURS[i % len(COLOURS)], font(14))
    return canvas


def placard(text: str) -> Tensor:
    """A picture (1, H, W, 3) that says why there is none."""
    canvas = Image.new("RGB", (640, 96), PAPER)
    ImageDraw.Draw(canvas).text((MARGIN, MARGIN), text, INK, font(16))
    return to_tensor(canvas)[None]


def preview(
    model: ModelPatcher, clip: CLIP, vae: VAE | None, lora: dict[str, Tensor], prompts: Sequence[str], settings: RunSettings
) -> Tensor:
    """Prompts drawn by the base (above) and with the LoRA in core's own loader (below), from the same seed: (1, H, W, 3).

    Only prompts that the HGR leaves alone may come here: they are decoded.
    """
    if vae is None:
        return placard("Connect a VAE to see clean prompts before and after.")
    if not prompts:
        return placard("The HGR judged every prompt harmful: there is no clean one to show.")
    changed, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    entries, (negative,) = encode_each(clip, list(prompts)), encode_each(clip, [""])
    # The base comes last: core patches weights in place, and so the model is left as it was.
    below, above = (
        _row(torch.cat([vae.decode(_draw(m, [entry], [negative], settings)) for entry in entries])) for m in (changed, model)
    )
    return torch.cat([above, below])[None]


def _draw(model: ModelPatcher, positive: list, negative: list, settings: RunSettings) -> Tensor:
    latent = empty_latent(model, settings, settings.sizes[0], 1)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(sum(settings.cfg) / 2)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), settings.scheduler, PREVIEW_STEPS)
    sampler, noise = comfy.samplers.sampler_object(settings.samplers[0]), comfy.sample.prepare_noise(latent, settings.seed)
    return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=settings.seed)


def _row(pictures: Tensor) -> Tensor:
    """Pictures (B, H, W, 3), or the first frames of videos (B, T, H, W, 3), side by side."""
    pictures = pictures[:, 0] if pictures.ndim == 5 else pictures
    return torch.cat(list(pictures.float().cpu()), dim=1)


def report(path: Path, counts: dict, change: Change, steps: int) -> str:
    """What was judged and what the LoRA changes."""
    each = ", ".join(f"{name} {count}" for name, count in counts["categories"].items())
    lines = [str(path), f"The HGR judged {counts['harmful']} of {counts['runs']} samples harmful: {each}."]
    if not counts["harmful"]:
        lines.append("All of the data is clean: there was nothing to learn, and the LoRA leaves the model as it is.")
    else:
        lines.append(
            f"After {steps} steps, harmful samples are {_percent(change.after)} from their safe target (before: {_percent(change.before)})."
        )
    lines.append(
        f"Clean samples change by {_percent(change.quiet)} (at most {_percent(change.quiet_most)}), the empty prompt by {_percent(change.empty)}; "
        "all in parts of the guidance."
    )
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    """A share for people, "-" where there is none."""
    return "-" if value is None else f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.2g} %"
