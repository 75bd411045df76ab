"""Models by the names that people give them, and those that draw nothing from a prompt."""

from ... import hgr_models

# Core's classes in `comfy.supported_models` by the name of what they are; classes of one name share their HGRs.
NAMES = {
    "SD15": "SD1.5", "SD15_instructpix2pix": "SD1.5", "SD20": "SD2", "SD21UnclipL": "SD2 unCLIP", "SD21UnclipH": "SD2 unCLIP", "SDXL": "SDXL",
    "SSD1B": "SDXL", "Segmind_Vega": "SDXL", "KOALA_700M": "SDXL", "KOALA_1B": "SDXL", "SDXL_instructpix2pix": "SDXL",
    "SDXLRefiner": "SDXL Refiner", "SD_X4Upscaler": "SD x4 Upscaler", "SVD_img2vid": "Stable Video Diffusion", "SV3D_u": "SV3D",
    "SV3D_p": "SV3D", "Stable_Zero123": "Stable Zero123", "Stable_Cascade_C": "Stable Cascade (stage C)",
    "Stable_Cascade_B": "Stable Cascade (stage B)", "SD3": "SD3", "PixArtAlpha": "PixArt-alpha", "PixArtSigma": "PixArt-sigma",
    "HunyuanDiT": "Hunyuan-DiT", "HunyuanDiT1": "Hunyuan-DiT", "Flux": "Flux.1", "FluxSchnell": "Flux.1", "FluxInpaint": "Flux.1",
    "Flux2": "Flux.2", "LongCatImage": "LongCat-Image", "ChromaRadiance": "Chroma Radiance", "Lumina2": "Lumina 2", "ZImage": "Z-Image",
    "ZImagePixelSpace": "Z-Image (pixels)", "PixelDiTT2I": "PixelDiT", "HiDreamO1": "HiDream-O1", "Omnigen2": "OmniGen2",
    "QwenImage": "Qwen-Image", "ErnieImage": "ERNIE-Image", "Kandinsky5Image": "Kandinsky 5 Image", "Kandinsky5": "Kandinsky 5 Video",
    "CosmosT2V": "Cosmos 1", "CosmosI2V": "Cosmos 1", "CosmosT2IPredict2": "Cosmos Predict2", "CosmosI2VPredict2": "Cosmos Predict2",
    "GenmoMochi": "Mochi 1", "LTXV": "LTX-Video", "LTXAV": "LTX-2", "HunyuanVideo": "HunyuanVideo", "HunyuanVideoI2V": "HunyuanVideo",
    "HunyuanVideoSkyreelsI2V": "HunyuanVideo", "HunyuanVideo15": "HunyuanVideo 1.5", "HunyuanVideo15_SR_Distilled": "HunyuanVideo 1.5",
    "HunyuanImage21": "HunyuanImage 2.1", "HunyuanImage21Refiner": "HunyuanImage 2.1 Refiner", "WAN22_T2V": "Wan 2.2 5B",
    "CogVideoX_T2V": "CogVideoX", "CogVideoX_I2V": "CogVideoX", "CogVideoX_Inpaint": "CogVideoX", "ACEStep": "ACE-Step",
    "ACEStep15": "ACE-Step 1.5", "StableAudio": "Stable Audio", "StableAudio3": "Stable Audio 3", "MiniMaxMusic3": "MiniMax Music 3",
    "MiniMaxH3": "MiniMax H3", "Hunyuan3Dv2": "Hunyuan3D 2", "Hunyuan3Dv2mini": "Hunyuan3D 2 mini", "Hunyuan3Dv2_1": "Hunyuan3D 2.1",
    "WAN_Animate2": "Wan Animate 2", "WAN21_FlowRVS": "Wan FlowRVS",
}  # fmt: skip
WAN = "Wan 2.1 / 2.2 14B"  # of one architecture, with inputs of their own
SHAPES = frozenset({"Hunyuan3Dv2", "Hunyuan3Dv2mini", "Hunyuan3Dv2_1", "TripoSplat", "Trellis2"})
NO_PROMPT = frozenset({"SeedVR2"})
SOUND_DIMENSIONS = 1


def class_of(model) -> str:
    """The name of core's class for a MODEL; "" where it has none."""
    config = getattr(model.model, "model_config", None)
    return "" if config is None else type(config).__name__


def architecture_of(model) -> str:
    """What people call a MODEL's architecture, such as "Flux.1"."""
    name = class_of(model)
    wan = name.startswith(("WAN21_", "WAN22_")) and name not in NAMES
    return NAMES.get(name, WAN if wan else name)


def refuse_unprompted(model) -> None:
    """Raises HGRError for a MODEL that draws neither pictures nor videos from a prompt."""
    name, latent = architecture_of(model), model.get_model_object("latent_format")
    what = ""
    if class_of(model) in SHAPES:
        what = "makes 3-D shapes from pictures"
    elif class_of(model) in NO_PROMPT:
        what = "restores videos and has no prompt"
    elif getattr(latent, "latent_dimensions", 2) == SOUND_DIMENSIONS:
        what = "makes sound"
    if what:
        raise hgr_models.HGRError(
            f"Expected a model that draws pictures or videos from a prompt, but {name} {what}. SafeCFG has nothing to redirect there, and "
            "nothing was recorded or changed."
        )
