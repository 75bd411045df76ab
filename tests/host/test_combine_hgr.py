"""`SafeCFG Combine HGR`: several HGR files as one HGR_MODEL, in real sampling runs."""

import dataclasses

import pytest
import torch
from safecfg import hgr_models
from safecfg.hgr_models import HGRError
from safecfg.nodes.loader import load_hgr_model
from safecfg.nodes.redirect.combine_hgr import CombineHGR, combine

from fakes import ALWAYS, INFO, NEVER, KnownRedirection, Once, apply_hgr, guide, make_hgr, sample
from test_guiders import cfg_guider

OTHER = dataclasses.replace(INFO, categories=("green", "red"))


@pytest.fixture
def save(tmp_path):
    """`save(name, seed, **make_hgr's)`: an HGR_MODEL of a file with random weights of its own."""

    def make(name: str, seed: int, **options):
        network = make_hgr(**options).patcher.model
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
        hgr_models.save_hgr(tmp_path / f"{name}.safetensors", network)
        return load_hgr_model(str(tmp_path / f"{name}.safetensors"))

    return make


def test_it_has_all_categories_and_is_shared(save):
    first, second = save("seven", 1), save("mine", 2, info=OTHER)
    both = CombineHGR.execute(first, second).result[0]
    assert both.info.categories == ("seven/red", "blue", "green", "mine/red")
    assert combine([first, second]) is both and both.hash not in (first.hash, second.hash)
    assert both.patcher.model is not first.patcher.model  # a patcher each: no network has two owners
    again, arguments = both.patcher.cached_patcher_init
    assert again(*arguments, disable_dynamic=True).model.info == both.info
    third = save("third", 3)
    nested = combine([both, third])
    assert len(nested.info.categories) == 6 and combine([first, second, third]) is nested


@pytest.mark.parametrize("cfg", [5.0, 1.0])
def test_pictures_are_those_of_the_hgr_that_flags(save, tiny_model, tiny_cond, cfg):
    conds = tiny_cond(1, batch=2), tiny_cond(2)
    run = lambda hgr, **options: sample(apply_hgr(tiny_model, hgr, **options), *conds, cfg=cfg, batch=2)  # noqa: E731
    plain = sample(tiny_model, *conds, cfg=cfg, batch=2)
    never = [save(f"never{i}", i, condition=NEVER, guidance=NEVER) for i in (1, 2)]
    always = [save(f"always{i}", i, condition=ALWAYS, guidance=ALWAYS) for i in (3, 4)]
    assert torch.equal(run(combine(never)), plain)
    assert torch.equal(run(combine(always), strength=0.0), plain)
    assert torch.equal(run(combine([never[0], always[0]])), run(always[0]))
    assert torch.equal(run(combine([always[0], never[0]])), run(always[0]))
    both = run(combine(always))
    assert both.isfinite().all() and not any(torch.equal(both, other) for other in (plain, run(always[0]), run(always[1])))


def test_the_guidance_is_redirected_exactly_once(save, monkeypatch, tiny_model, tiny_cond):
    redirection = KnownRedirection(monkeypatch)
    both = combine([save("a", 1), save("b", 2)])
    guide(cfg_guider(apply_hgr(tiny_model, both, redirect="guidance"), tiny_cond), Once())
    assert redirection.count == 1


def test_what_cannot_be_combined_is_refused(save, tmp_path):
    first, twin = save("a", 1), save("b", 2, info=dataclasses.replace(INFO, latent_format="SDXL"))
    with pytest.raises(HGRError, match=r"a\.safetensors is there twice"):
        combine([first, first])
    with pytest.raises(HGRError, match="a has latent_format SD15 and b has SDXL"):
        combine([first, twin])
    with pytest.raises(HGRError, match="at least two"):
        combine([first])
    changed = save("c", 3)
    save("c", 4)
    with pytest.raises(HGRError, match=r"c\.safetensors has changed since it was loaded"):
        combine([first, changed])
    (tmp_path / "c.safetensors").unlink()
    with pytest.raises(HGRError, match="is gone"):
        combine([first, changed])
