"""Several HGRs as one: each judges its own, flagged samples go through those that flagged them, nothing else changes."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from helpers import info, small_hgr
from hgr_models import HGR, CategorySettings, HGRError, redirect_condition, redirect_guidance, save_hgr
from hgr_models.combined import CombinedHGR, combined_info
from hgr_models.redirection import read_guidance

ALWAYS, NEVER = -1.0, 1.0  # threshold offsets
ROWS = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0], [0, 1.0, 1.0, 0], [0, 0, 0, 0]])  # the first HGR, the second, both, none


def parts(**facts) -> tuple[HGR, HGR]:
    return small_hgr(1, **facts), small_hgr(2, **facts)


def combined(first: HGR, second: HGR) -> CombinedHGR:
    return CombinedHGR([first, second], ["first", "second"]).eval().requires_grad_(False)


def settings(strengths, offset: float) -> CategorySettings:
    return CategorySettings(tuple(map(float, strengths)), offset)


def latents(spatial=(8, 6), rows: int = 4):
    """cond_denoised, uncond_denoised, x_in and sigma."""
    generator = torch.Generator().manual_seed(3)
    return *(torch.randn(rows, 4, *spatial, generator=generator) for _ in range(3)), torch.tensor([9.0, 2.0, 0.7, 0.0])[:rows]


def texts(pooled_width: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    pooled = torch.randn(4, pooled_width, generator=generator).to(dtype) if pooled_width else None
    return torch.randn(4, 7, 16, generator=generator).to(dtype), pooled


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Harmfulness is the same but for the last bit of a sigmoid, which depends on its place in the processor's vectors."""
    torch.testing.assert_close(one, other, rtol=0, atol=2e-7)


@pytest.mark.parametrize(("dimensions", "spatial"), [(2, (8, 6)), (2, (7, 5)), (3, (3, 8, 6))])
def test_a_direction_that_one_hgr_flags_gets_what_this_one_would_do(dimensions, spatial):
    first, second = parts(dimensions=dimensions)
    both, (cond, uncond, x, sigma) = combined(first, second), latents(spatial)
    result = redirect_guidance(both, cond, uncond, x, sigma, settings([1] * 4, NEVER), ROWS)
    for row, hgr, columns in ((0, first, slice(0, 2)), (1, second, slice(2, 4))):
        alone = redirect_guidance(hgr, cond, uncond, x, sigma, settings([1] * 2, NEVER), ROWS[:, columns])
        assert torch.equal(result.cond_denoised[row], alone.cond_denoised[row])
        assert not torch.equal(result.cond_denoised[row], cond[row])
        same(result.harmfulness[:, columns], alone.harmfulness)
    assert torch.equal(result.cond_denoised[3], cond[3])
    assert torch.equal(result.weights, ROWS)


def test_a_direction_that_both_flag_goes_through_one_after_the_other():
    first, second = parts()
    cond, uncond, x, sigma = latents()
    once = redirect_guidance(first, cond, uncond, x, sigma, settings([1, 1], ALWAYS)).cond_denoised
    twice = redirect_guidance(second, once, uncond, x, sigma, settings([1, 1], ALWAYS)).cond_denoised
    result = redirect_guidance(combined(first, second), cond, uncond, x, sigma, settings([1] * 4, ALWAYS)).cond_denoised
    assert_close(result, twice, rtol=1e-4, atol=1e-4)
    assert (result - once).abs().max() > 0.01 and (result - cond).abs().max() > 0.01


def test_a_direction_that_the_first_and_the_third_flag_goes_through_both():
    """What lies between them flags nothing: the third still corrects what the first one left."""
    first, second, third = (small_hgr(seed) for seed in (1, 2, 3))
    every = CombinedHGR([first, second, third], "abc").eval().requires_grad_(False)
    cond, uncond, x, sigma = latents()
    flags = torch.tensor([[1.0, 1.0, 0, 0, 1.0, 1.0]]).expand(4, -1)
    once = redirect_guidance(first, cond, uncond, x, sigma, settings([1, 1], ALWAYS)).cond_denoised
    twice = redirect_guidance(third, once, uncond, x, sigma, settings([1, 1], ALWAYS)).cond_denoised
    result = redirect_guidance(every, cond, uncond, x, sigma, settings([1] * 6, NEVER), flags).cond_denoised
    assert_close(result, twice, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooled_width", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prompts_go_through_those_that_flag_them(pooled_width, dtype):
    first, second = parts(pooled_width=pooled_width)
    both, (tokens, pooled) = combined(first, second), texts(pooled_width, dtype)
    deltas = both.condition.delta(tokens, pooled, ROWS)
    for row, hgr, columns in ((0, first, slice(0, 2)), (1, second, slice(2, 4))):
        alone = hgr.condition.delta(tokens, pooled, ROWS[:, columns])
        assert torch.equal(deltas[0][row], alone[0][row])
        assert not pooled_width or torch.equal(deltas[1][row], alone[1][row])
    assert not deltas[0][3].any()
    always = [settings([1] * k, ALWAYS) for k in (2, 2, 4)]
    once = redirect_condition(first, tokens, pooled, always[0])
    twice = redirect_condition(second, once.tokens, once.pooled, always[1])
    result = redirect_condition(both, tokens, pooled, always[2])
    limit = {torch.float32: 1e-5, torch.float16: 2e-2}[dtype]
    assert_close(result.tokens, twice.tokens, rtol=limit, atol=limit)
    assert not pooled_width or torch.allclose(result.pooled, twice.pooled, rtol=limit, atol=limit)
    judged = torch.cat([hgr.condition.harmfulness(tokens, pooled) for hgr in (first, second)], dim=1)
    same(result.harmfulness, judged)  # of the prompt as it came, not as the first one left it


def test_nothing_flagged_keeps_every_bit():
    both, (cond, uncond, x, sigma), (tokens, _) = combined(*parts()), latents(), texts()
    assert torch.equal(redirect_guidance(both, cond, uncond, x, sigma, settings([1] * 4, NEVER)).cond_denoised, cond)
    assert torch.equal(redirect_guidance(both, cond, uncond, x, sigma, settings([0] * 4, ALWAYS)).cond_denoised, cond)
    assert torch.equal(redirect_guidance(both, cond, cond, x, sigma, settings([1] * 4, ALWAYS)).cond_denoised, cond)
    assert torch.equal(redirect_condition(both, tokens, None, settings([1] * 4, NEVER)).tokens, tokens)


def test_a_switched_off_hgr_is_as_if_it_were_not_there():
    first, second = parts()
    both, (cond, uncond, x, sigma) = combined(first, second), latents()
    alone = redirect_guidance(second, cond, uncond, x, sigma, settings([1, 0.5], ALWAYS)).cond_denoised
    assert torch.equal(redirect_guidance(both, cond, uncond, x, sigma, settings([0, 0, 1, 0.5], ALWAYS)).cond_denoised, alone)


@pytest.mark.parametrize(("offset", "readings"), [(NEVER, 3), (ALWAYS, 3 + 2)])  # on a CPU nothing is corrected without a flag
def test_cost_one_more_reading_per_further_hgr(monkeypatch, offset, readings):
    hgrs = [small_hgr(seed) for seed in (1, 2, 3)]
    both, counts = CombinedHGR(hgrs, "abc"), []
    for hgr in hgrs:
        read = hgr.guidance.read
        monkeypatch.setattr(hgr.guidance, "read", lambda *args, read=read: (counts.append(1), read(*args))[1])
    redirect_guidance(both, *latents(), settings([1] * 6, offset))
    assert len(counts) == readings


def test_each_network_keeps_its_threshold_at_every_noise_level():
    first = info(guidance_levels=(-1.0, 2.0), guidance_thresholds=((0.1, 0.2), (0.3, 0.4), (0.5, 0.6)))
    second = info(guidance_levels=(2.0, 5.0), guidance_thresholds=((0.15, 0.25), (0.35, 0.45), (0.55, 0.65)))
    networks = small_hgr(1), small_hgr(2)
    for hgr, facts in zip(networks, (first, second), strict=True):
        hgr.calibrate(facts)
    both = combined(*networks)
    sigma = torch.tensor([-2.0, -1.0, 0.0, 2.0, 3.0, 5.0, 6.0]).div(-2).exp()
    wanted = torch.cat([hgr.guidance_thresholds_at(sigma) for hgr in networks], dim=1)
    assert torch.equal(both.guidance_thresholds_at(sigma), wanted)
    assert both.info.guidance_levels == (-1.0, 2.0, 5.0)


def test_an_hgr_without_one_network_never_flags_by_it():
    first, second = parts()
    only_condition = HGR(first.info, first.condition.config, None).eval()
    both = combined(only_condition, second)
    cond, uncond, x, sigma = latents()
    result = redirect_guidance(both, cond, uncond, x, sigma, settings([1] * 4, ALWAYS))
    alone = redirect_guidance(second, cond, uncond, x, sigma, settings([1] * 2, ALWAYS))
    assert torch.equal(result.cond_denoised, alone.cond_denoised)
    assert not result.harmfulness[:, :2].any() and not result.weights[:, :2].any()
    reading = read_guidance(both.guidance, cond, uncond, x, sigma)[2]
    assert not reading.picture_logits[:, :2].sigmoid().any() and not reading.places[:, :2].sigmoid().any()
    only_guidance = HGR(first.info, None, first.guidance.config).eval()
    read = combined(only_guidance, second).condition.harmfulness(texts()[0])
    assert not read[:, :2].any()
    same(read[:, 2:], second.condition.harmfulness(texts()[0]))
    assert both.condition is not None and combined(only_condition, only_condition).guidance is None


def test_names_are_told_apart_and_facts_are_joined():
    facts = [
        info(base="a", concept_prompts={"drugs": "pills"}, picture_thresholds=(0.1, 0.2)),
        info(categories=("brand", "drugs"), base="a", concept_prompts={"brand": "logo"}, picture_thresholds=(0.3, 0.4)),
    ]
    both = combined_info(facts, ["seven", "my, own"])
    assert both.categories == ("weapons", "seven/drugs", "brand", "my_ own/drugs")
    assert both.concept_prompts == {"seven/drugs": "pills", "brand": "logo"}
    assert (both.base, both.picture_thresholds, both.training) == ("a", (0.1, 0.2, 0.3, 0.4), {"combined": ["seven", "my, own"]})
    assert combined_info([facts[0], info(base="b")], "xy").base == "a + b"
    assert combined_info([facts[0], info()], "xy").picture_thresholds == ()
    assert combined_info([facts[0], facts[0]], "xx").categories == ("x/weapons", "x/drugs", "x 2/weapons", "x 2/drugs")


def test_refused_combinations_say_why(tmp_path):
    with pytest.raises(HGRError, match="at least two"):
        combined_info([info()], ["a"])
    for change in (
        {"latent_format": "SDXL"},
        {"prediction": "V"},
        {"token_width": 8},
        {"pooled_width": 4},
        {"latent_channels": 8},
    ):
        name = next(iter(change))
        with pytest.raises(HGRError, match=f"one family, but a has {name} .* and b has {change[name]}"):
            combined_info([info(), dataclasses.replace(info(), **change)], "ab")
    with pytest.raises(HGRError, match="cannot be saved as one file"):
        save_hgr(tmp_path / "both.safetensors", combined(*parts()))
