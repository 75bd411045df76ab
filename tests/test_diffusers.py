"""Pipelines of diffusers with an HGR draw what the equations of the ComfyUI path give, and clean pictures to the last bit."""

import logging
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from helpers import info
from hgr_models import HGR, CategorySettings, HGRError, redirect_condition, redirect_guidance, save_hgr
from hgr_models.condition import ConditionConfig
from hgr_models.edges import Edge
from hgr_models.guidance import GuidanceConfig

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-dev.txt")

from hgr_models.diffusers import Protection, protect  # noqa: E402
from hgr_models.diffusers.families import family_of, sigma_of  # noqa: E402

WIDTH, POOLED, STEPS, CFG = 16, 8, 3, 4.0
ALWAYS, NEVER = -1.0, 1.0  # threshold offsets
LATENTS = {"sd15": "SD15", "v": "SD15", "sdxl": "SDXL", "sd3": "SD3", "flux": "Flux"}
PREDICTION = {"sd15": "EPS", "v": "V", "sdxl": "EPS", "sd3": "FLOW", "flux": "FLOW"}
NETWORK = {"width": 16, "read_depth": 1, "correct_depth": 2, "heads": 2}


def unet(**more):
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, **more,
    )  # fmt: skip


def euler(**more):
    return diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **more)


def make_pipe(kind):
    """A pipeline with random weights and no text encoder: tokens come as they are."""
    torch.manual_seed(0)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    second = dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    if kind in ("sd15", "v"):
        scheduler = euler(prediction_type="v_prediction" if kind == "v" else "epsilon")
        parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**nothing, unet=unet(), scheduler=scheduler, **parts)
    elif kind == "sdxl":
        more = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + POOLED}
        network = unet(addition_embed_type="text_time", **more)
        pipe = diffusers.StableDiffusionXLPipeline(**nothing, **second, unet=network, scheduler=euler())
    elif kind == "sd3":
        network = diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            caption_projection_dim=16, joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, pos_embed_max_size=16,
        )  # fmt: skip
        third = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = diffusers.StableDiffusion3Pipeline(**nothing, **second, **third, transformer=network, scheduler=scheduler)
    else:
        network = diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=POOLED, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
        )  # fmt: skip
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = diffusers.FluxPipeline(**nothing, **second, transformer=network, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_hgr(kind, **changes):
    torch.manual_seed(1)
    pooled = 0 if kind in ("sd15", "v") else POOLED
    facts = {"latent_format": LATENTS[kind], "prediction": PREDICTION[kind], "pooled_width": pooled, **changes}
    condition = ConditionConfig(WIDTH, 2, pooled, width=32, depth=1, delta_depth=1, heads=2)
    hgr = HGR(info(**facts), condition, GuidanceConfig(4, 2, 2, **NETWORK))
    heads = (
        hgr.condition.token_out,
        hgr.condition.erase,
        hgr.condition.pooled_out,
        hgr.guidance.residual,
        hgr.guidance.attenuation,
    )
    for head in heads:
        if head is not None:
            torch.nn.init.normal_(head.weight, std=0.3)
    return hgr.eval().requires_grad_(False)


def inputs(kind, size=8):
    """Tokens for two pictures, their negatives, and noise (2, 4, size, size)."""
    make = torch.Generator().manual_seed(2)
    tokens, negative, noise = (torch.randn(2, *s, generator=make) for s in ((5, WIDTH), (5, WIDTH), (4, size, size)))
    pooled, negative_pooled = (torch.randn(2, POOLED, generator=make) for _ in range(2))
    return tokens, negative, pooled, negative_pooled, noise


def draw(pipe, kind, **more):
    """The final latents (2, 4, 8, 8) of a pipeline."""
    tokens, negative, pooled, negative_pooled, noise = inputs(kind)
    given = {"prompt_embeds": tokens, "negative_prompt_embeds": negative, "latents": noise, "output_type": "latent"}
    if kind not in ("sd15", "v"):
        given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}
    given |= {"height": 8 * pipe.vae_scale_factor, "width": 8 * pipe.vae_scale_factor, "num_inference_steps": STEPS}
    if kind == "flux":
        given |= {"true_cfg_scale": CFG, "latents": family_of(pipe.transformer).pack(noise)}
        ids = pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
        return family_of(pipe.transformer).unpack(pipe(**{**given, **more}).images, ids)
    return pipe(**{"guidance_scale": CFG, **given, **more}).images


def denoiser_of(pipe, kind, tokens, pooled):
    """The network alone, called as core calls it: `f(x_in, sigma, timestep)`."""
    if kind in ("sd15", "v"):
        return lambda x, sigma, t: pipe.unet(x, t, encoder_hidden_states=tokens, return_dict=False)[0]
    if kind == "sdxl":
        size = 8 * pipe.vae_scale_factor
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[size, size, 0, 0, size, size]] * 2).float()}
        call = {"encoder_hidden_states": tokens, "added_cond_kwargs": added, "return_dict": False}
        return lambda x, sigma, t: pipe.unet(x, t, **call)[0]
    call = {"encoder_hidden_states": tokens, "pooled_projections": pooled, "return_dict": False}
    if kind == "sd3":
        return lambda x, sigma, t: pipe.transformer(x, timestep=(1000 * sigma).expand(2), **call)[0]
    ids = pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
    call |= {"img_ids": ids, "txt_ids": torch.zeros(5, 3)}
    pack, unpack = family_of(pipe.transformer).pack, family_of(pipe.transformer).unpack
    return lambda x, sigma, t: unpack(pipe.transformer(pack(x), timestep=sigma.expand(2), **call)[0], ids)


@torch.no_grad()
def comfy_path(pipe, kind, hgr, settings):
    """Euler's method over x0 predictions as ComfyUI has them, with both redirections of DESIGN.md."""
    tokens, negative, pooled, negative_pooled, x = inputs(kind)
    found = redirect_condition(hgr, tokens, pooled if hgr.info.pooled_width else None, settings)
    cond = denoiser_of(pipe, kind, found.tokens, found.pooled)
    uncond = denoiser_of(pipe, kind, negative, negative_pooled)
    flow = PREDICTION[kind] == "FLOW"
    x = x if flow else x * pipe.scheduler.init_noise_sigma
    for i, t in enumerate(pipe.scheduler.timesteps):
        sigma, following = pipe.scheduler.sigmas[i : i + 2]
        x_in = x if flow else x / (sigma**2 + 1) ** 0.5
        outputs = (network(x_in, sigma, t) for network in (cond, uncond))
        if kind == "v":
            denoised = [x / (sigma**2 + 1) - o * sigma / (sigma**2 + 1) ** 0.5 for o in outputs]
        else:
            denoised = [x - o * sigma for o in outputs]
        safe = redirect_guidance(hgr, *denoised, x_in, sigma.expand(2), settings).cond_denoised
        guided = denoised[1] + CFG * (safe - denoised[1])
        x = x + (x - guided) / sigma * (following - sigma)
    return x


@pytest.mark.parametrize("kind", LATENTS)
def test_a_pipeline_draws_what_the_comfyui_path_draws(kind):
    pipe, hgr = make_pipe(kind), make_hgr(kind)
    plain = draw(pipe, kind)
    protection = protect(pipe, hgr, threshold_offset=ALWAYS, strict=True)
    safe = draw(pipe, kind)
    protection.remove()
    wanted = comfy_path(pipe, kind, hgr, CategorySettings((1.0, 1.0), ALWAYS))
    assert (safe - plain).abs().max() > 0.05
    assert_close(safe, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(pipe, kind), plain)


@pytest.mark.parametrize("kind", LATENTS)
def test_clean_pictures_stay_to_the_last_bit(kind):
    pipe = make_pipe(kind)
    plain = draw(pipe, kind)
    protect(pipe, make_hgr(kind), threshold_offset=NEVER, strict=True)
    assert torch.equal(draw(pipe, kind), plain)


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_each_network_alone_changes_the_picture(kind):
    found = [draw(make_pipe(kind), kind)]
    for redirect in ("condition", "guidance", "both"):
        pipe = make_pipe(kind)
        protect(pipe, make_hgr(kind), threshold_offset=ALWAYS, redirect=redirect)
        found.append(draw(pipe, kind))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("kind, more", [("sd15", {"guidance_scale": 1.0}), ("flux", {"true_cfg_scale": 1.0})])
def test_a_run_without_a_negative_is_noticed(kind, more, caplog):
    pipe = make_pipe(kind)
    protection = protect(pipe, make_hgr(kind), threshold_offset=ALWAYS)
    with caplog.at_level(logging.WARNING):
        draw(pipe, kind, **more)
        draw(pipe, kind, **more)
    assert caplog.text.count("its guidance is not redirected") == 1
    protection.redirector.strict = True
    with pytest.raises(HGRError, match="no negative"):
        draw(pipe, kind, **more)


def test_another_family_is_refused_before_anything_changes():
    for kind, changes, said in (
        ("sd15", {"latent_format": "SDXL"}, "SDXL latents"),
        ("v", {"prediction": "EPS"}, "EPS prediction"),
        ("sd15", {"token_width": 24}, "token width 24"),
        ("sdxl", {"pooled_width": 4}, "pooled width 4"),
    ):
        pipe, hgr = make_pipe(kind), make_hgr(kind)
        hgr.info = replace(hgr.info, **changes)
        with pytest.raises(HGRError, match=said):
            protect(pipe, hgr)
        assert "encode_prompt" not in vars(pipe)


def test_settings_are_those_of_the_node():
    pipe = make_pipe("sd15")
    with pytest.raises(HGRError, match="gore"):
        protect(pipe, make_hgr("sd15"), categories="gore = 1")
    with pytest.raises(HGRError, match="redirect"):
        protect(pipe, make_hgr("sd15"), redirect="concept")
    plain = draw(pipe, "sd15")
    protection = protect(pipe, make_hgr("sd15"), threshold_offset=ALWAYS, categories="weapons = off, drugs = off")
    assert isinstance(protection, Protection) and torch.equal(draw(pipe, "sd15"), plain)


def test_protected_twice_only_the_last_counts(caplog):
    once, twice = make_pipe("sd15"), make_pipe("sd15")
    protect(once, make_hgr("sd15"), threshold_offset=ALWAYS)
    for offset in (NEVER, ALWAYS):
        protection = protect(twice, make_hgr("sd15"), threshold_offset=offset)
    assert torch.equal(draw(once, "sd15"), draw(twice, "sd15")) and "protected before" in caplog.text
    protection.remove()
    assert torch.equal(draw(twice, "sd15"), draw(make_pipe("sd15"), "sd15"))


def test_pipelines_that_share_a_denoiser_keep_to_themselves():
    plain, one = draw(make_pipe("sd15"), "sd15"), make_pipe("sd15")
    other = diffusers.StableDiffusionPipeline(**one.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    protect(one, make_hgr("sd15"), threshold_offset=ALWAYS, strict=True)
    safe = draw(one, "sd15")
    assert not torch.equal(safe, plain) and torch.equal(draw(other, "sd15"), plain)
    protect(other, make_hgr("sd15"), threshold_offset=ALWAYS, strict=True)
    assert torch.equal(draw(other, "sd15"), safe) and torch.equal(draw(one, "sd15"), safe)


def test_tokens_encoded_ahead_are_redirected_once():
    """As services do that keep encoded prompts: `encode_prompt` by hand, then a call with `prompt_embeds`."""
    pipe, tokens = make_pipe("sd15"), inputs("sd15")[0]
    protect(pipe, make_hgr("sd15"), threshold_offset=ALWAYS)
    ahead = pipe.encode_prompt(None, "cpu", 1, False, prompt_embeds=tokens)[0]
    assert torch.equal(ahead, tokens)
    assert torch.equal(draw(pipe, "sd15", prompt_embeds=ahead), draw(pipe, "sd15"))


def test_the_modular_pipeline_s_guider_does_the_same():
    """Stable Diffusion XL: one denoiser call for the prompt and one for the negative, so its last bits are its own."""
    whole, hgr = make_pipe("sdxl"), make_hgr("sdxl")
    tokens, negative, pooled, negative_pooled, noise = inputs("sdxl")
    from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

    def run(**settings):
        pipe = StableDiffusionXLDenoiseStep().init_pipeline()
        pipe.update_components(unet=whole.unet, scheduler=euler())
        pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=CFG))
        if settings:
            protect(pipe, hgr, **settings)
        pipe.scheduler.set_timesteps(STEPS)
        size = float(8 * whole.vae_scale_factor)
        times = torch.tensor([[size, size, 0, 0, size, size]] * 2)
        prompts = {
            "prompt_embeds": tokens, "pooled_prompt_embeds": pooled, "add_time_ids": times,
            "negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled, "negative_add_time_ids": times,
        }  # fmt: skip
        return pipe(
            latents=noise * pipe.scheduler.init_noise_sigma, timesteps=pipe.scheduler.timesteps, num_inference_steps=STEPS,
            denoiser_input_fields=prompts, output="latents",
        )  # fmt: skip

    plain, clean, safe = run(), run(threshold_offset=NEVER), run(threshold_offset=ALWAYS)
    assert torch.equal(clean, plain)
    whole.scheduler.set_timesteps(STEPS)
    assert_close(safe, comfy_path(whole, "sdxl", hgr, CategorySettings((1.0, 1.0), ALWAYS)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["EPS", "V", "X0", "FLOW"])
def test_an_edge_finds_x0_and_the_way_back(prediction):
    """By hand: sigma 0.75 is a = 0.8, b = 0.6; of a flow a = 0.25, b = 0.75. x0 = 2, noise = -1."""
    sigma, x0, noise = torch.tensor([0.75]), torch.full((1, 4, 2, 2), 2.0), torch.full((1, 4, 2, 2), -1.0)
    a, b = (0.25, 0.75) if prediction == "FLOW" else (0.8, 0.6)
    make = {"EPS": lambda p: noise + (x0 - p) * a / b, "V": lambda p: (a * (a * x0 + b * noise) - p) / b}
    make |= {"X0": lambda p: p, "FLOW": lambda p: (a * x0 + b * noise - p) / b}
    x_in, output = a * x0 + b * noise, make[prediction](x0)
    edge = Edge(prediction)
    assert_close(edge.denoised(output, x_in, sigma), x0)
    assert_close(output + edge.output_change(torch.ones_like(x0), sigma), make[prediction](x0 + 1))
    if prediction != "X0":
        assert not edge.output_change(torch.ones_like(x0), torch.zeros(1)).any()
    with pytest.raises(HGRError, match="'CUBIC'"):
        Edge("CUBIC")


@pytest.mark.parametrize(
    "name", ["DDIM", "DDPM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep", "PNDM"]
)
def test_noise_levels_are_the_schedulers(name):
    """A picture noised by the scheduler itself has the noise level that we read off: b / a."""
    scheduler = getattr(diffusers, f"{name}Scheduler")(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(7)
    edge, zero, one = Edge("EPS"), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    for t in scheduler.timesteps[:-1].unique():
        a, b = (float(scheduler.add_noise(x, n, t.reshape(1))) for x, n in ((one, zero), (zero, one)))
        assert sigma_of(scheduler, edge, t) == pytest.approx(b / a, rel=1e-3)


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    """The five lines of docs/DIFFUSERS.md, with a pipeline and an HGR of their names."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    text = (Path(__file__).parents[1] / "docs" / "DIFFUSERS.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) == 5
    words = [*map(chr, range(97, 123)), *(f"{chr(c)}</w>" for c in range(97, 123)), "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(str({w: i for i, w in enumerate(words)}).replace("'", '"'))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=len(words) - 1, bos_token_id=len(words) - 2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=77)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(config), tokenizer=tokenizer,
        unet=unet(), scheduler=euler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    folder, file = re.search(r'from_pretrained\("([^"]+)"', code).group(1), re.search(r'"([^"]+\.safetensors)"', code).group(1)
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained(folder)
    save_hgr(file, make_hgr("sd15"))
    (tmp_path / "example.py").write_text(code.replace("safecfg", "hgr_models"), encoding="utf-8")
    found = runpy.run_path("example.py")
    assert isinstance(found["protection"], Protection) and found["image"].size == (64, 64)
