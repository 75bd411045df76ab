"""What docs/sd15.md, docs/sdxl.md and docs/flux.md say of time, memory and disk: computed, nothing is measured.

    COMFYUI_PATH=PATH python -m benchmarks.guide_costs      (in the Python of that ComfyUI)

Counts of texts, model rows and steps, bytes on disk and bytes beside the model are those of `nodes/training/estimate.py`, the estimate that the
nodes show, for models of these layouts. There, seconds are measured on the user's machine; here they are FLOPs divided by an assumed speed:
`SPEEDS`, in FLOP per second that a GPU sustains in fp16, and SMALL_STEP for every step of a redirector, which waits for launched kernels more than
for arithmetic. Loading models and decoding are not counted.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from .training_memory import GIB, flux, sdxl, start

SPEEDS = (15e12, 60e12)
SMALL_STEP = 0.1  # seconds, as the estimate adds to a step through the model
BACKWARD = 3  # forward and backward in forward passes
STEPS, PROMPTS = 25, 100  # of an evaluation: steps per picture, pictures per arm
WIDGETS = {  # of Train HGR, its defaults
    "harmful_runs": 240, "clean_runs": 240, "calibration_runs": 100, "run_steps": 8, "batch": 8, "sizes": "auto",
    "samplers": "euler, dpmpp_2m, euler_ancestral", "scheduler": "auto", "cfg_min": 0.0, "cfg_max": 0.0, "negatives": "(empty)", "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A family: widths and tokens of a prompt, the largest latent of a picture, parameters of its text encoders, rows of a step."""

    name: str
    token_width: int
    pooled_width: int
    short_width: int
    tokens: int
    latent: tuple[int, int, int]
    text_parameters: float
    rows: int  # of a step of sampling
    denoiser: object = None  # batch -> (network, forward pass), on the meta device


def sd15(batch: int):
    """Stable Diffusion 1.5, fp16, 512 x 512."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as unet
    import comfy.ops

    dtype = torch.float16
    network = unet.UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4],
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], transformer_depth_middle=1,
        context_dim=768, num_heads=8, use_spatial_transformer=True, dtype=dtype, device="meta", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    make = lambda *shape: torch.empty(*shape, device="meta", dtype=dtype)  # noqa: E731
    return network, lambda: network(make(batch, 4, 64, 64), make(batch), make(batch, 77, 768))


LAYOUTS = (
    Layout("SD1.5, 512 x 512", 768, 768, 0, 77, (4, 64, 64), 123e6, 2, sd15),
    Layout("SDXL, 1024 x 1024", 2048, 1280, 768, 77, (4, 128, 128), 818e6, 2, sdxl),
    Layout("Flux.1 dev, 1024 x 1024", 4096, 768, 0, 256, (16, 128, 128), 4.9e9, 1, flux),
)


class Encoder:
    """A CLIP of a layout: random tokens, so that nothing repeats and the disk's estimate is an upper bound."""

    def __init__(self, layout: Layout):
        self.layout = layout

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        chunks = 1 if self.layout.tokens > 77 else 1 + len(text.split()) // 60
        tokens = torch.randn(1, chunks * self.layout.tokens, self.layout.token_width)
        return [[tokens, {"pooled_output": torch.randn(1, self.layout.pooled_width)}]]


def flops_of(run) -> float:
    """FLOPs of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def session_of(layout: Layout, plan, prompts):
    """What the estimate asks a session for."""
    from safecfg.hgr_models.hgr import uncalibrated_info

    channels = layout.latent[0]
    facts = {
        "categories": list(prompts.categories), "latent_format": layout.name, "latent_channels": channels, "latent_dimensions": 2,
        "prediction": "EPS", "guidance_levels": [-3.5, -1.0, 1.5], "token_width": layout.token_width, "pooled_width": layout.pooled_width,
    }  # fmt: skip
    info = uncalibrated_info(facts)
    configs = plan.configs(info, layout.short_width)
    return SimpleNamespace(
        plan=plan, prompts=prompts, clip=Encoder(layout), model=object(), new_info=lambda: info, configs=lambda: configs,
        facts={**facts, "short_width": layout.short_width}, device=torch.device("cpu"),
    )  # fmt: skip


def text_step(session, layout: Layout) -> float:
    """FLOPs of a step in text space."""
    from safecfg import hgr_models
    from safecfg.hgr_models import losses
    from safecfg.hgr_models.textspace import draw_readers, text_errors
    from safecfg.hgr_models.train_text import random_texts

    with torch.device("meta"):
        network = hgr_models.HGR(session.new_info(), session.configs()[0], None).condition
    pairs, read = random_texts(session.new_info(), layout.tokens, torch.device("meta"))
    readers = draw_readers(layout.token_width, torch.Generator().manual_seed(0), torch.device("cpu"))
    readers = replace(readers, **{k: v.to("meta") for k, v in vars(readers).items() if isinstance(v, torch.Tensor)})

    def run():
        text_errors(network, pairs, readers)
        losses.prompt_loss(network, read.tokens, read.harms, read.pooled)

    return BACKWARD * flops_of(run)


def guidance_step(session, layout: Layout) -> float:
    """FLOPs of a step of the guidance redirector."""
    from safecfg.hgr_models.train_guidance import POINTS
    from safecfg.nodes.training import estimate

    network = estimate._guidance_network(session, torch.device("cpu"))
    return BACKWARD * POINTS / 2 * flops_of(lambda: estimate._guidance_loss(network, layout.latent, 2))


def print_layout(layout: Layout) -> None:
    from safecfg.hgr_models.pairs.seven import default_prompts
    from safecfg.nodes.protect.library import PRESET, RUNS, built_in_prompts
    from safecfg.nodes.training import estimate
    from safecfg.nodes.training.inputs import train_plan
    from safecfg.nodes.training.prompt_recorder import bytes_of_prompt

    network, run = layout.denoiser(1)
    with torch.no_grad():
        row = flops_of(run)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    print(f"\n{layout.name}: {row / 1e12:.2f} TFLOP a model row, weights {weights / GIB:.1f} GiB")
    estimate._shape = lambda session: layout.latent
    plans = [("Protect", train_plan("x", "prompts", {**RUNS, "preset": PRESET}), built_in_prompts())]
    plans += [
        (f"Train HGR, {kind}", train_plan("x", kind, WIDGETS), default_prompts())
        for kind in ("prompts", "prompts + guidance", "thorough")
    ]
    for name, plan, prompts in plans:
        session = session_of(layout, plan, prompts)
        text, step = 2 * layout.text_parameters * layout.tokens, text_step(session, layout)
        guided = guidance_step(session, layout) if plan.by_guidance else 0.0
        tokens, line = bytes_of_prompt(session.clip, prompts), []
        for speed in SPEEDS:
            parts = estimate._seconds(plan, session, text / speed, row / speed, guided / speed + SMALL_STEP)
            parts["encoding"] *= estimate.share_kept(prompts, tokens)
            parts["prompts"] = plan.prompt_steps * (step / speed + SMALL_STEP)
            line.append(
                f"{estimate.in_words(sum(parts.values()))} ({', '.join(f'{k} {estimate.in_words(v)}' for k, v in parts.items() if v >= 1)})"
            )
        disk = estimate._bytes_on_disk(plan, session, layout.latent if plan.records else (), tokens)
        beside = estimate._bytes_of_training(session) + (estimate.guidance_bytes(session) if plan.by_guidance else 0)
        at_work = estimate.text_bytes(session.facts)
        print(f"  {name}: " + "; ".join(f"{s / 1e12:.0f} TFLOP/s {t}" for s, t in zip(SPEEDS, line, strict=True)))
        print(
            f"    disk {estimate.in_bytes(disk)}, beside the model {estimate.in_bytes(beside)}, a step from prompts {estimate.in_bytes(at_work)}"
        )
    picture = STEPS * layout.rows * row
    for speed in SPEEDS:
        print(f"  Evaluate, {speed / 1e12:.0f} TFLOP/s: {picture / speed:.0f} s a picture, {PROMPTS} prompts in two arms "
              f"{estimate.in_words(2 * PROMPTS * picture / speed)}")  # fmt: skip


def main() -> None:
    start()
    for layout in LAYOUTS:
        print_layout(layout)


if __name__ == "__main__":
    main()
