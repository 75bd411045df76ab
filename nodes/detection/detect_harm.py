"""`SafeCFG Detect Harm`: how harmful is a picture, and where?"""

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import io, ui

from ...hgr_models.detection import Detection, Looks, picture_thresholds
from ..host.schema import HGR_TYPE, make_input, make_schema
from ..loader import HGRModel
from ..reporting import drawing
from . import scores as texts
from .detector import check_pictures, check_sees_pictures, encode, heat_map, look


def detect_pictures(
    model: ModelPatcher,
    hgr: HGRModel,
    negative: list,
    positive: list | None,
    pictures: torch.Tensor,
    vae: VAE | None,
    longest_side: int,
    looks: Looks,
) -> tuple[Detection, tuple[float, float]]:
    """A Detection of pictures (B, H, W, 3), and the parts (height, width) of its places that show them."""
    check_pictures(pictures)
    if vae is None:
        raise ValueError("Expected a VAE beside the pictures. Connect the model's VAE, or connect a latent instead of the image.")
    latents, parts = encode(vae, pictures, hgr.info, longest_side)
    return look(model, hgr, latents, negative, positive, looks), parts


def preview(rules: texts.Rules, found: Detection, pictures: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """The drawings (B, H', W', 3) of pictures (B, H, W, 3) under their heat maps (B, H, W)."""
    limits = [limit if on else None for limit, on in zip(rules.thresholds, rules.counted, strict=True)]
    flags = rules.flags(found.scores)
    drawn = []
    for i, (picture, hot) in enumerate(zip(pictures, heat, strict=True)):
        bars = [drawing.Bar(*row) for row in zip(rules.categories, found.scores[i].tolist(), limits, strict=True)]
        title = f"picture {i + 1} of {len(pictures)}: {'harmful' if flags[i] else 'clean'}"
        drawn.append(drawing.detection(picture, hot, bars, title))
    return torch.stack(drawn)


def _shown(vae: VAE | None, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (B, H, W, 3) to draw for latents: decoded, or a grey field where no VAE is connected."""
    if vae is None:
        height, width = latents.shape[-2:]
        return torch.full((len(latents), 8 * height, 8 * width, 3), 0.3)
    pictures = vae.decode(latents)
    if pictures.ndim == 5:  # a video: its middle frame
        pictures = pictures[:, pictures.shape[1] // 2]
    return pictures[..., :3].float().cpu()


class DetectHarm(io.ComfyNode):
    """Looks at noised pictures with the model; see `hgr_models.detection`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="SafeCFG_DetectHarm",
            display_name="SafeCFG Detect Harm",
            description="Tells how harmful pictures are, per category, and where. It noises each picture to two levels and looks at what "
            "the model makes of it, which costs less than three sampling steps. Works with and without the picture's prompt.",
            search_aliases=["safety checker", "nsfw detector", "moderation", "heat map"],
            is_output_node=True,
            inputs=[*_model_inputs(), *_picture_inputs(), *_how_inputs()],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, hgr: HGRModel, negative: list, threshold: float = 0.0, categories: str = "", longest_side: int = 0,
        draws: int = 1, fixed_seed: int = 0, image: torch.Tensor | None = None, latent: dict[str, torch.Tensor] | None = None,
        vae: VAE | None = None, positive: list | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if (image is None) == (latent is None):
            raise ValueError(
                f"Expected an image or a latent, but got {'neither' if image is None else 'both'}. Connect one of them."
            )
        check_sees_pictures(hgr)  # before its thresholds, which it then does not have
        stored = () if threshold > 0 else picture_thresholds(hgr.info, hgr.path)
        rules = texts.Rules.of(hgr.info, stored, threshold, categories)
        looks, parts = Looks(draws=draws, seed=fixed_seed), (1.0, 1.0)
        if image is not None:
            found, parts = detect_pictures(model, hgr, negative, positive, image, vae, longest_side, looks)
        else:
            assert latent is not None  # one of the two is there
            found = look(model, hgr, latent["samples"], negative, positive, looks)
            image = _shown(vae, latent["samples"])
        heat = heat_map(found, rules.counted, tuple(image.shape[1:3]), parts)
        drawn = preview(rules, found, image, heat)
        flagged = rules.flags(found.scores)
        with_prompt = positive is not None and hgr.patcher.model.condition is not None
        text = texts.write(rules, "images", found.scores, with_prompt=with_prompt)
        results = (max(rules.harmfulness(found.scores)), text, any(flagged), flagged, heat, drawn)
        return io.NodeOutput(*results, ui=ui.PreviewImage(drawn, cls=cls))


def _model_inputs() -> list:
    return [
        make_input(
            io.Model, "model", tooltip="The model to look with. SafeCFG Apply in it is left out: detecting needs no redirection."
        ),
        make_input(HGR_TYPE, "hgr", tooltip="From SafeCFG Load HGR; it must have been trained for this model's family."),
        make_input(
            io.Conditioning,
            "negative",
            tooltip="The empty prompt (CLIP Text Encode without text), for which the thresholds were calibrated.",
        ),
    ]


def _picture_inputs() -> list:
    return [
        make_input(
            io.Image,
            "image",
            optional=True,
            tooltip="Pictures of any size, without alpha channel; each of the batch is judged on its own. They need the VAE.",
        ),
        make_input(
            io.Latent, "latent", optional=True, tooltip="Instead of the image: latents of this model, such as a sampler's output."
        ),
        make_input(
            io.Vae,
            "vae",
            optional=True,
            tooltip="The model's VAE: it encodes the image. For a latent it only decodes the preview.",
        ),
        make_input(
            io.Conditioning,
            "positive",
            optional=True,
            tooltip="The picture's prompt, if there is one. It can add to the alarm and never lessens it: a caption may hide what a picture shows.",
        ),
    ]


def _how_inputs() -> list:
    number = lambda kind, name, default, low, high, text, **more: make_input(  # noqa: E731
        kind, name, default=default, min=low, max=high, tooltip=text, **more
    )
    return [
        *texts.rule_inputs("pictures"),
        number(
            io.Int, "longest_side", 0, 0, 8192,
            "In pixels. Larger pictures are scaled down to it first; choose what your model draws best (512 for Stable Diffusion 1.5). "
            "0: as they are.",
            step=8,
        ),
        number(
            io.Int, "draws", 1, 1, 16,
            "1 to 16. How often the picture is looked at per noise level, with other noise each time: steadier scores for that many "
            "times the cost. The thresholds were calibrated with 1.",
            advanced=True,
        ),
        # Not `seed`: the front end would give that a control that changes it after every run.
        number(io.Int, "fixed_seed", 0, 0, 2**53 - 1, "Of the noise. The same seed gives the same scores.", advanced=True, display_name="noise_seed"),
    ]  # fmt: skip


def _outputs() -> list:
    return [
        io.Float.Output(display_name="harmfulness", tooltip="0 to 1: the worst picture in its worst category."),
        io.String.Output(display_name="scores", tooltip="JSON: thresholds, and for every picture its scores per category."),
        io.Boolean.Output(display_name="harmful", tooltip="True when any picture exceeds a threshold."),
        io.Boolean.Output(
            display_name="flagged", is_output_list=True, tooltip="The same for every picture, as a list, for SafeCFG Image Gate."
        ),
        io.Mask.Output(display_name="heat_map", tooltip="0 to 1 per pixel: where a picture is harmful. As large as the image."),
        io.Image.Output(display_name="preview", tooltip="The picture, its heat map over it, and a bar per category."),
    ]
