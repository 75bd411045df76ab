"""Architectures of models by the names that people give them, as an HGR's file and an index of HGRs hold them."""

# Core's classes in `comfy.supported_models` by the name of what they are; classes of one name share their HGRs.
NAMES = {
    "SD15": "SD1.5", "SD15_instructpix2pix": "SD1.5", "SD20": "SD2", "SD21UnclipL": "SD2 unCLIP", "SD21UnclipH": "SD2 unCLIP", "SDXL": "SDXL",
    "SSD1B": "SDXL", "Segmind_Vega": "SDXL", "KOALA_700M": "SDXL", "KOALA_1B": "SDXL", "SDXL_instructpix2pix": "SDXL",
    "SDXLRefiner": "SDXL Refiner", "SD_X4Upscaler": "SD x4 Upscaler", "SVD_img2vid": "Stable Video Diffusion", "SV3D_u": "SV3D", "SV3D_p": "SV3D",
    "Stable_Zero123": "Stable Zero123", "Stable_Cascade_C": "Stable Cascade (stage C)", "Stable_Cascade_B": "Stable Cascade (stage B)",
    "SD3": "SD3", "PixArtAlpha": "PixArt-alpha", "PixArtSigma": "PixArt-sigma", "HunyuanDiT": "Hunyuan-DiT", "HunyuanDiT1": "Hunyuan-DiT",
    "Flux": "Flux.1", "FluxSchnell": "Flux.1", "FluxInpaint": "Flux.1", "Flux2": "Flux.2", "LongCatImage": "LongCat-Image",
    "ChromaRadiance": "Chroma Radiance", "Lumina2": "Lumina 2", "ZImage": "Z-Image", "ZImagePixelSpace": "Z-Image (pixels)",
    "PixelDiTT2I": "PixelDiT", "HiDreamO1": "HiDream-O1", "Omnigen2": "OmniGen2", "QwenImage": "Qwen-Image", "ErnieImage": "ERNIE-Image",
    "Kandinsky5Image": "Kandinsky 5 Image", "Kandinsky5": "Kandinsky 5 Video", "CosmosT2V": "Cosmos 1", "CosmosI2V": "Cosmos 1",
    "CosmosT2IPredict2": "Cosmos Predict2", "CosmosI2VPredict2": "Cosmos Predict2", "GenmoMochi": "Mochi 1", "LTXV": "LTX-Video", "LTXAV": "LTX-2",
    "HunyuanVideo": "HunyuanVideo", "HunyuanVideoI2V": "HunyuanVideo", "HunyuanVideoSkyreelsI2V": "HunyuanVideo",
    "HunyuanVideo15": "HunyuanVideo 1.5", "HunyuanVideo15_SR_Distilled": "HunyuanVideo 1.5", "HunyuanImage21": "HunyuanImage 2.1",
    "HunyuanImage21Refiner": "HunyuanImage 2.1 Refiner", "WAN22_T2V": "Wan 2.2 5B", "CogVideoX_T2V": "CogVideoX", "CogVideoX_I2V": "CogVideoX",
    "CogVideoX_Inpaint": "CogVideoX", "ACEStep": "ACE-Step", "MiniMaxH3": "MiniMax H3", "WAN_Animate2": "Wan Animate 2",
}  # fmt: skip
WAN = "Wan 2.1 / 2.2 14B"  # of one architecture, with inputs of their own: core's other WAN21_ and WAN22_ classes
# Core's classes whose own name is what people say.
PLAIN = ("Anima", "AuraFlow", "Boogu", "Chroma", "HiDream", "Ideogram4", "JoyImage", "Krea2", "Lens", "MageFlow", "PiD")
ARCHITECTURES = tuple(sorted({*NAMES.values(), *PLAIN, WAN}, key=str.lower))  # all that an HGR can be for
