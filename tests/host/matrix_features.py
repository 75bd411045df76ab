"""What else a run can have: areas, masks, times, a ControlNet, LoRA hooks, inpainting, other batches and sizes; one or two at a time."""

import dataclasses
from collections.abc import Callable
from functools import cache

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import torch

from host_nodes import call
from matrix import Prompts, Scene
from matrix_ideal import prompt
from patches import PATCHES
from tiny import UNET, make_tiny_model


@dataclasses.dataclass(frozen=True)
class Feature:
    """Changes of a graph's prompts, latents and sampler, and of its MODEL.

    per_picture: it needs a batch of one picture. custom_sampler: it needs nodes that take a SAMPLER.
    """

    prompts: Callable[[Prompts], Prompts] = lambda prompts: prompts
    scene: Callable[[Scene], Scene] = lambda scene: scene
    patch: Callable = lambda model: model
    per_picture: bool = False
    custom_sampler: bool = False


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _conditions(change: Callable[[list], list], negative: bool = False):
    """A change of every prompt to draw, and of the negative one."""

    def changed(prompts: Prompts) -> Prompts:
        prompts = prompts.changed(change)
        return dataclasses.replace(prompts, negative=change(prompts.negative)) if negative else prompts

    return changed


def _also(conditioning: list) -> list:
    """A second harmful prompt beside a first, for ConditioningCombine."""
    return prompt(11, batch=len(conditioning[0][0]))


def _with_area(conditioning: list) -> list:
    (area,) = call("ConditioningSetArea", conditioning=_also(conditioning), width=32, height=32, x=16, y=16, strength=0.8)
    return conditioning + area


def _with_mask(conditioning: list) -> list:
    mask = torch.linspace(0, 1, 64).reshape(1, 8, 8)
    return conditioning + call("ConditioningSetMask", conditioning=_also(conditioning), mask=mask, strength=0.9)[0]


def _with_times(conditioning: list) -> list:
    (early,) = call("ConditioningSetTimestepRange", conditioning=conditioning, start=0.0, end=0.5)
    return early + call("ConditioningSetTimestepRange", conditioning=_also(conditioning), start=0.3, end=1.0)[0]


@cache
def _control_net() -> comfy.controlnet.ControlNet:
    """Core's own class, with random weights; its outputs are as large as what they are added to."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = {key: value for key, value in UNET.items() if key not in ("out_channels", "transformer_depth_output")}
        network = comfy.cldm.cldm.ControlNet(hint_channels=3, **config)
        for parameter in network.parameters():
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            torch.nn.init.normal_(parameter, std=std)
    cpu = torch.device("cpu")
    return comfy.controlnet.ControlNet(network.eval().requires_grad_(False), load_device=cpu)


def _with_control(conditioning: list) -> list:
    image = torch.rand(1, 64, 64, 3, generator=_generator(3))
    return call("ControlNetApply", conditioning=conditioning, control_net=_control_net(), image=image, strength=0.5)[0]


@cache
def _lora_hook() -> comfy.hooks.HookGroup:
    """As CreateHookLora makes it of a file."""
    weights = make_tiny_model().model.diffusion_model.state_dict()
    lora = {}
    for name in (key.removesuffix(".weight") for key, value in weights.items() if "attn2.to_v" in key and value.ndim == 2):
        rows, columns = weights[f"{name}.weight"].shape
        lora[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 2, generator=_generator(4)) * 0.3
        lora[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(2, columns, generator=_generator(5)) * 0.3
    return comfy.hooks.create_hook_lora(lora, 1.0, 1.0)


def _with_hook(conditioning: list) -> list:
    (hooked,) = call(
        "ConditioningSetProperties", cond_NEW=_also(conditioning), strength=1.0, set_cond_area="default", hooks=_lora_hook()
    )
    return conditioning + hooked


def _latent(**more):
    """Another latent: a picture of the same size, and what `more` adds."""

    def changed(scene: Scene) -> Scene:
        samples = torch.randn(scene.latent["samples"].shape, generator=_generator(9))
        return dataclasses.replace(scene, latent={**scene.latent, "samples": samples, **more})

    return changed


def _scene(**settings):
    return lambda scene: dataclasses.replace(scene, **settings)


def _four_pictures(scene: Scene) -> Scene:
    """Of two prompts, as a part of a larger batch."""
    samples = scene.latent["samples"].repeat(2, 1, 1, 1)
    return dataclasses.replace(scene, latent={**scene.latent, "samples": samples, "batch_index": [0, 5, 2, 9]})


def _growing(scene: Scene) -> Scene:
    return dataclasses.replace(
        scene, steps=2, sampler=call("SamplerLCMUpscale", scale_ratio=1.5, scale_steps=1, upscale_method="bilinear")[0]
    )


def _one_negative(prompts: Prompts) -> Prompts:
    """Of another length: core repeats both to a common one."""
    tokens = torch.cat([prompt(2, 1)[0][0]] * 2, dim=1)
    return dataclasses.replace(prompts, negative=[[tokens, {}]])


MASK = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
FEATURES = {
    "an area": Feature(_conditions(_with_area, negative=True)),
    "a mask": Feature(_conditions(_with_mask)),
    "times": Feature(_conditions(_with_times), _scene(steps=3)),
    "ControlNet": Feature(_conditions(_with_control)),  # core gives it to the negative too
    "a LoRA hook": Feature(_conditions(_with_hook)),
    "inpainting": Feature(scene=_latent(noise_mask=MASK)),
    "img2img": Feature(scene=lambda scene: dataclasses.replace(_latent()(scene), denoise=0.5)),
    "four pictures of two prompts": Feature(scene=_four_pictures),
    "one long negative": Feature(_one_negative),
    "a growing latent": Feature(scene=_growing, custom_sampler=True),
    "cfg 1": Feature(scene=_scene(cfg=1.0)),
    "cfg 0": Feature(scene=_scene(cfg=0.0)),
    "context windows": Feature(patch=PATCHES["ContextWindowsManual"].apply, per_picture=True),
}
