"""Core's nodes that change a MODEL's guidance or output, with what they need to act on the tiny model."""

import dataclasses
from collections.abc import Callable
from functools import cache

import torch

from host_nodes import call
from matrix import COUPLED, Prompts, Scene
from matrix_check import Case
from tiny import make_tiny_model, tiny_conditioning


@dataclasses.dataclass(frozen=True)
class Patch:
    """A node of the matrix.

    batch: 1 for nodes that cannot do more (core's own limits). coupled: it mixes a batch's pictures. steps: caches need
    several to act. masked: it changes inpainting. windows: how many context windows it makes of a latent. impossible: ways to
    sample with which core itself fails. acts: whether it changes what the tiny model draws with KSampler.
    """

    node: Callable | None = None
    batch: int = 2
    coupled: bool = False
    steps: int = 1
    masked: bool = False
    windows: int = 1
    impossible: tuple[str, ...] = ()
    acts: bool = True

    def apply(self, model):
        return self.node(model) if self.node else model

    def scene(self) -> Scene:
        scene = Scene.make(self.batch, steps=self.steps)
        if self.masked:
            mask = torch.linspace(0, 1, 64).reshape(1, 8, 8)
            scene.latent.update(
                samples=torch.randn(self.batch, 4, 8, 8, generator=torch.Generator().manual_seed(9)), noise_mask=mask
            )
        return scene


def node(name: str, output: int = 0, **inputs) -> Callable:
    return lambda model: call(name, model=model, **inputs)[output]


def _with_operation(model):
    return call("LatentApplyOperationCFG", model=model, operation=call("LatentOperationSharpen", sharpen_radius=2)[0])[0]


def _reference_audio(model):
    class AudioVAE:
        audio_sample_rate = 8

        def encode(self, audio):
            return torch.ones(1, 1, 2, 2)

    audio = {"waveform": torch.zeros(1, 1, 8), "sample_rate": 8}
    prompts = dict(positive=tiny_conditioning(1), negative=tiny_conditioning(2))
    return call("LTXVReferenceAudio", model=model, reference_audio=audio, audio_vae=AudioVAE(), **prompts)[0]


@cache
def _cascade_sampling():
    """Core computes 10,000 sigmas one by one: once is enough."""
    return call("ModelSamplingStableCascade", model=make_tiny_model())[0].object_patches["model_sampling"]


def _stable_cascade(model):
    model = model.clone()
    model.add_object_patch("model_sampling", _cascade_sampling())
    return model


WINDOWS = dict(context_length=4, context_overlap=2, context_schedule="standard_static", fuse_method="pyramid")
PATCHES = {
    "APG": Patch(node("APG", eta=0.5, norm_threshold=1.0)),
    "CFGNorm": Patch(node("CFGNorm")),
    "CFGOverride": Patch(node("CFGOverride", cfg=2.0)),
    "CFGZeroStar": Patch(node("CFGZeroStar")),
    "ChromaRadianceOptions": Patch(node("ChromaRadianceOptions", nerf_tile_size=1), acts=False),
    "ContextWindowsManual": Patch(node("ContextWindowsManual", dim=2, **WINDOWS), batch=1, windows=3),
    "DifferentialDiffusion": Patch(node("DifferentialDiffusion", strength=0.5), masked=True),
    "EasyCache": Patch(node("EasyCache", reuse_threshold=0.5, start_percent=0.1), batch=1, coupled=True, steps=6),
    "Epsilon Scaling": Patch(node("Epsilon Scaling", scaling_factor=1.2)),
    "FreSca": Patch(node("FreSca", scale_high=2.0, freq_cutoff=2)),
    "FreeU": Patch(node("FreeU")),
    "FreeU_V2": Patch(node("FreeU_V2")),
    "HyperTile": Patch(node("HyperTile", tile_size=32)),
    "LTXVModalityGuidance": Patch(node("LTXVModalityGuidance"), acts=False),
    "LTXVReferenceAudio": Patch(_reference_audio, acts=False),
    "LTXVSpatioTemporalGuidance": Patch(node("LTXVSpatioTemporalGuidance"), acts=False),
    "LatentApplyOperationCFG": Patch(_with_operation),
    "LazyCache": Patch(node("LazyCache", reuse_threshold=0.5, start_percent=0.1), coupled=True, steps=6),
    "Mahiro": Patch(node("Mahiro"), coupled=True),
    "ModelAttentionBackend": Patch(node("ModelAttentionBackend", attention="pytorch attention"), acts=False),
    "ModelComputeDtype": Patch(node("ModelComputeDtype", dtype="fp32"), acts=False),
    "ModelSamplingContinuousEDM": Patch(node("ModelSamplingContinuousEDM", sampling="eps")),
    "ModelSamplingDiscrete": Patch(node("ModelSamplingDiscrete", sampling="lcm", zsnr=False), acts=False),
    "ModelSamplingStableCascade": Patch(_stable_cascade),
    "NAGuidance": Patch(node("NAGuidance")),
    "PatchModelAddDownscale": Patch(node("PatchModelAddDownscale", block_number=1)),
    "PerpNeg": Patch(node("PerpNeg", empty_conditioning=tiny_conditioning(4), neg_scale=0.7), coupled=True),
    "PerturbedAttentionGuidance": Patch(node("PerturbedAttentionGuidance")),
    "RenormCFG": Patch(node("RenormCFG"), batch=1),
    "RescaleCFG": Patch(node("RescaleCFG")),
    "ScaleROPE": Patch(node("ScaleROPE", scale_x=2.0), acts=False),
    "SelfAttentionGuidance": Patch(node("SelfAttentionGuidance"), impossible=("BasicGuider", "DualModelGuider")),
    "SkipLayerGuidanceDiT": Patch(node("SkipLayerGuidanceDiT", start_percent=0.0, end_percent=1.0), acts=False),
    "SkipLayerGuidanceDiTSimple": Patch(node("SkipLayerGuidanceDiTSimple"), acts=False),
    "TCFG": Patch(node("TCFG")),
    "TemporalScoreRescaling": Patch(node("TemporalScoreRescaling", tsr_k=0.5, tsr_sigma=5.0), batch=1),
    "TomePatchModel": Patch(node("TomePatchModel")),
    "VideoLinearCFGGuidance": Patch(node("VideoLinearCFGGuidance")),
    "VideoTriangleCFGGuidance": Patch(node("VideoTriangleCFGGuidance")),
    "WanAnimate2Cache": Patch(node("WanAnimate2Cache"), acts=False),
    "WanContextWindowsManual": Patch(
        node("WanContextWindowsManual", **{**WINDOWS, "context_length": 13, "context_overlap": 8}), batch=1, windows=3
    ),
}


def case_of(way: str, name: str, **settings) -> Case:
    """A way to sample with a node of PATCHES, or with `none`; `settings` of the Scene."""
    spec = PATCHES.get(name, Patch())
    scene = dataclasses.replace(spec.scene(), **settings)
    windows = spec.windows if way.startswith("DualCFG") else 1  # elsewhere the hooks see the latent as a whole
    rows, coupled = frozenset({spec.batch - 1}), spec.coupled or way in COUPLED
    return Case(way, Prompts.make(spec.batch), scene, spec.apply, rows, coupled, windows)


# They make another family of the model: refused, whether they come before or after SafeCFG.
REFUSED = [
    ("MiniMaxH3SigmaShift", {}),
    ("ModelSamplingAuraFlow", {}),
    ("ModelSamplingContinuousEDM", {"sampling": "edm"}),
    ("ModelSamplingContinuousEDM", {"sampling": "v_prediction"}),
    ("ModelSamplingContinuousV", {}),
    ("ModelSamplingDiscrete", {"sampling": "v_prediction"}),
    ("ModelSamplingDiscrete", {"sampling": "x0"}),
    ("ModelSamplingFlux", {}),
    ("ModelSamplingLTXV", {}),
    ("ModelSamplingSD3", {}),
]
# Not for the tiny model. What they hook into is in the matrix with other nodes.
ELSEWHERE = {
    "AnimaLLLiteApply": "patches Anima's blocks",
    "FluxKVCache": "patches Flux's blocks",
    "HiDreamO1PatchSeamSmoothing": "wraps HiDream's network",
    "HypernetworkLoader": "patches attention with a file's weights",
    "LTXVContextWindows": "ContextWindowsManual with other units",
    "ModelNoiseScale": "scales the noise of flow models",
    "QwenImageDiffsynthControlnet": "patches Qwen-Image's blocks",
    "SDPoseKeypointExtractor": "samples key points, no picture",
    "SUPIRApply": "patches SDXL's blocks with a file's weights, and a post_cfg function",
    "SelectModelDevice": "moves the model",
    "TorchCompileModel": "compiles the network (test_memory.py)",
    "TrainLoraNode": "trains: SafeCFG is taken out",
    "TripoSplatSamplingPreview": "shows TripoSplat's steps",
    "USOStyleReference": "patches Flux's blocks",
    "WanInfiniteTalkToVideo": "patches Wan's blocks, and prepares its latents",
    "WanUni3CControlnetApply": "patches Wan's blocks",
    "ZImageFunControlnet": "patches Z-Image's blocks",
}  # fmt: skip
