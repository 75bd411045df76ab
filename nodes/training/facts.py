"""What a recording is of: the model's family and the prompts, as JSON in every shard and later in the HGR's metadata."""

from ...hgr_models.condition import narrower_width
from ...hgr_models.pairs import PromptSet
from ...hgr_models.redirection import SIGMA_FLOOR, log_snr_of
from ...hgr_models.shards import Texts
from ..families import base_of_model, prediction_of, refuse_image_to_image

LEVELS = (0.2, 0.5, 0.75)  # parts of the schedule at which the thresholds of the guidance redirector change


def recording_facts(model, prompts: PromptSet, sample: Texts) -> dict:
    """What every shard of a recording says; `sample` is any encoded prompt."""
    refuse_image_to_image(model)
    latent, sampling = model.get_model_object("latent_format"), model.get_model_object("model_sampling")
    sigmas = [max(SIGMA_FLOOR, float(sampling.percent_to_sigma(part))) for part in LEVELS]
    short = narrower_width(sample.tokens)
    return {
        "categories": list(prompts.categories),
        "latent_format": type(latent).__name__,
        "latent_channels": latent.latent_channels,
        "latent_dimensions": getattr(latent, "latent_dimensions", 2),
        "prediction": prediction_of(sampling),
        "token_width": sample.tokens.shape[-1],
        "pooled_width": 0 if sample.pooled is None else sample.pooled.shape[-1],
        "guidance_levels": [float(log_snr_of(sample.tokens.new_tensor([s]))) for s in sigmas],
        "concept_prompts": dict(prompts.concept_prompts),
        "prompts": prompts.digest(),
        "base": base_of_model(model),
        **({"short_width": short} if short else {}),
    }
