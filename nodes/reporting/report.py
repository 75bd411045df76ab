"""`SafeCFG Report`: what SafeCFG did in the run that made a latent."""

import json

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui

from ..host.hooks import KEY
from ..host.schema import make_input, make_schema
from ..host.settings import ApplySettings
from . import report_drawing, traces

OFF = "this MODEL has no SafeCFG"
OFF_REASON = "It went through no SafeCFG Apply, or through one with strength 0: this is the picture of the model alone."
MISS = "no trace for this latent"
MISS_REASON = (
    "This SafeCFG Apply did not sample it, it was changed after sampling, or newer runs took its place. "
    "Connect the MODEL and the LATENT of the same sampler."
)


def make_report(settings: ApplySettings | None, latent: dict) -> tuple[torch.Tensor, str]:
    """Pictures (B, H, W, 3) in [0, 1], one per image of a LATENT, and the same in JSON; `settings` None: of a MODEL without SafeCFG."""
    count = len(traces.digests(latent["samples"]))
    if settings is None:
        texts = [f"SafeCFG Report, image {i} of {count}: {OFF}. {OFF_REASON}" for i in range(1, count + 1)]
        entries = [{"found": False, "reason": f"{OFF}. {OFF_REASON}"}] * count
        return torch.stack([report_drawing.miss(1, text) for text in texts]), json.dumps({"categories": {}, "images": entries})
    found = traces.trace_of(latent, settings.identity)
    images = found.images if found is not None else (None,) * count
    pictures, entries, k = [], [], len(settings.info.categories)
    for i, image in enumerate(images, start=1):
        title = f"SafeCFG Report, image {i} of {count}"
        if image is None:
            pictures.append(report_drawing.miss(k, f"{title}: {MISS}. {MISS_REASON}"))
            entries.append({"found": False, "reason": f"{MISS}. {MISS_REASON}"})
        else:
            seed = "" if image.seed is None else f", seed {image.seed}"
            pictures.append(report_drawing.report(image, f"{title}{seed}"))
            entries.append({"found": True, **image.summary(), **image.details()})
    return torch.stack(pictures), json.dumps({"categories": _thresholds(settings), "images": entries}, allow_nan=False)


def _thresholds(settings: ApplySettings) -> dict[str, float | None]:
    """Of the prompts, per category; None: switched off."""
    limits, strengths = settings.info.limits(offset=settings.categories.threshold_offset).tolist(), settings.categories.strengths
    return {
        name: round(limit, 6) if strength > 0 else None
        for name, limit, strength in zip(settings.info.categories, limits, strengths, strict=True)
    }


class Report(io.ComfyNode):
    """Draws the traces of a latent; see `make_report`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_Report",
            display_name="SafeCFG Report",
            description="Shows what SafeCFG did in the run that made a latent, for each image: how harmful prompt and guidance were "
            "at every step, against the thresholds, how far the guidance was turned, and where. It costs no sampling.",
            search_aliases=["safety report", "nsfw score", "trace", "plot", "log"],
            inputs=[
                make_input(io.Model, "model", tooltip="The MODEL of SafeCFG Apply that the sampler used."),
                make_input(io.Latent, "latent", tooltip="The sampler's LATENT, as it came out: not yet upscaled or blended."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="report", tooltip="A picture per image: curves with thresholds, redirection, heat map."
                ),
                io.String.Output(
                    display_name="scores",
                    tooltip="JSON for logs and SafeCFG Image Gate: for every image its scores, and what was read at every step.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelPatcher, latent: dict) -> io.NodeOutput:
        settings = model.get_attachment(KEY)
        pictures, text = make_report(settings, latent)
        return io.NodeOutput(pictures, text, ui=ui.PreviewImage(pictures, cls=cls))
