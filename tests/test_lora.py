"""LoRA adapters: zero at first, the merged weights' equal, removed without a trace, and stored in ComfyUI's key format."""

import pytest
import torch
from torch import nn

from hgr_models import HGRError
from hgr_models.lora import (
    ALL,
    AUTO,
    CROSS_ATTENTION,
    LAYERS,
    LINEAR,
    LoRA,
    LoraSettings,
    load_lora,
    lora_from,
    new_lora,
    save_lora,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 2, bias=False))])

    def forward(self, x):
        h = self.grouped(self.conv(x))
        return self.blocks[0](h.flatten(2).transpose(1, 2))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def trained(net, layers=ALL) -> LoRA:
    """A LoRA that changes something."""
    lora = new_lora(net, LoraSettings(4, 2.0, layers), 0)
    for i, adapter in enumerate(lora.adapters):
        nn.init.normal_(adapter.up, std=0.5, generator=torch.Generator().manual_seed(i))
    return lora


def test_a_new_lora_changes_nothing_and_learns_everywhere(net):
    lora, plain = new_lora(net, LoraSettings(4, 2.0, ALL), 0), net(X)
    with lora.attached(net):
        assert torch.equal(net(X), plain)
        net(X).square().sum().backward()
    assert all(adapter.up.grad.any() for adapter in lora.adapters)
    assert not any(p.grad is not None for p in net.parameters())


def test_an_adapter_starts_as_torch_s_own_layers_do():
    """`down` is uniform up to 1 / sqrt(inputs): here 1 / 8."""
    lora = new_lora(nn.Sequential(nn.Linear(64, 32)), LoraSettings(16, 2.0, "linear"), 0)
    down = lora.adapters[0].down
    assert down.shape == (16, 64) and 0.12 < down.abs().max() <= 0.125 and abs(float(down.mean())) < 0.01
    assert LoraSettings() == LoraSettings(64, 64.0, "auto")  # as strong as it was trained


def test_attached_off_and_detached(net):
    lora, plain = trained(net), net(X)
    with lora.attached(net):
        changed = net(X)
        with lora.off():
            assert torch.equal(net(X), plain)
        assert torch.equal(net(X), changed) and not torch.equal(changed, plain)
    assert torch.equal(net(X), plain) and not any(layer._forward_hooks for layer in net.modules())


def test_it_is_what_merging_the_stored_tensors_gives(net):
    lora = trained(net)
    with lora.attached(net):
        attached = net(X)
    tensors = lora.tensors(torch.float32)
    for name in lora.names:
        up, down, alpha = (tensors[f"diffusion_model.{name}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        layer = net.get_submodule(name)
        layer.weight += alpha / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
    torch.testing.assert_close(net(X), attached)


def test_layers_ranks_and_scales(net):
    every, linear = trained(net), trained(net, layers=LINEAR)
    assert every.names == ("conv", "blocks.0.0", "blocks.0.2") and linear.names == ("blocks.0.0", "blocks.0.2")
    tensors = every.tensors()
    assert tensors["diffusion_model.conv.lora_up.weight"].shape == (8, 4, 1, 1)
    assert tensors["diffusion_model.conv.lora_down.weight"].shape == (4, 3, 3, 3)
    assert tensors["diffusion_model.conv.lora_down.weight"].dtype == torch.float16
    # a layer with two outputs has rank 2 at most, and the same alpha / rank
    assert tensors["diffusion_model.blocks.0.2.lora_up.weight"].shape == (2, 2)
    assert tensors["diffusion_model.blocks.0.2.alpha"] == 1.0 and tensors["diffusion_model.conv.alpha"] == 2.0


def test_a_unet_is_changed_where_it_reads_the_prompt():
    block = nn.ModuleDict({"attn1": nn.ModuleDict({"to_k": nn.Linear(4, 4)}), "attn2": nn.ModuleDict({"to_k": nn.Linear(6, 4)})})
    unet, transformer = nn.ModuleList([block]), nn.Sequential(nn.Linear(4, 4), nn.Conv2d(1, 1, 1))
    names = lambda network, layers: new_lora(network, LoraSettings(2, 2.0, layers), 0).names  # noqa: E731
    assert names(unet, CROSS_ATTENTION) == names(unet, AUTO) == ("0.attn2.to_k",)
    assert names(unet, LINEAR) == ("0.attn1.to_k", "0.attn2.to_k") and names(transformer, AUTO) == ("0",)
    with pytest.raises(HGRError, match="no layers of the kind 'cross-attention'.*Choose other `layers`"):
        names(transformer, CROSS_ATTENTION)


def test_the_seed_decides(net):
    a, b, c = (new_lora(net, LoraSettings(), seed).tensors() for seed in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


def test_saved_and_loaded(net, tmp_path):
    lora, path = trained(net), tmp_path / "loras" / "x.safetensors"
    save_lora(path, lora.tensors(torch.float32), {"steps": 3})
    tensors, about = load_lora(path)
    assert about == {"steps": 3} and [p.name for p in path.parent.iterdir()] == ["x.safetensors"]
    with lora.attached(net):
        expected = net(X)
    with lora_from(tensors).attached(net):
        assert torch.equal(net(X), expected)


def test_halves_and_other_precisions_keep_the_networks_dtype(net):
    net, lora = net.bfloat16(), trained(net)
    with lora.attached(net):
        out = net(X.bfloat16())
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and lora.adapters[0].up.grad.dtype == torch.float32


class Rebuilt(nn.Module):
    """A linear layer that is none of torch's, as hosts make them for quantised weights."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features, self.store = layer.in_features, layer.out_features, layer.weight

    def forward(self, x):
        return x @ self.store.to(x.dtype).T


def test_linear_layers_that_a_host_rebuilt(net):
    net.blocks[0][2] = Rebuilt(net.blocks[0][2])
    lora, plain = trained(net), net(X)
    assert "blocks.0.2" in lora.names
    with lora.attached(net):
        assert not torch.equal(net(X), plain)


def test_errors_say_what_is_wrong(net, tmp_path):
    lora = trained(net)
    with pytest.raises(HGRError, match="layer 'conv', which this network lacks"), lora.attached(nn.Sequential(nn.Linear(2, 2))):
        pass
    assert not any(layer._forward_hooks for layer in net.modules())
    with pytest.raises(HGRError, match="no layers"):
        new_lora(nn.Sequential(nn.GELU()), LoraSettings(), 0)
    with pytest.raises(HGRError, match=f"one of {', '.join(LAYERS)}, but got 'some'"):
        new_lora(net, LoraSettings(layers="some"), 0)
    tensors = lora.tensors()
    with pytest.raises(HGRError, match="lacks 'diffusion_model.conv.alpha'"):
        lora_from({k: t for k, t in tensors.items() if k != "diffusion_model.conv.alpha"})
    with pytest.raises(HGRError, match="got .'x'"):
        lora_from({**tensors, "x": torch.zeros(1)})
    path = tmp_path / "x.safetensors"
    save_lora(path, tensors, {})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(HGRError, match="x.safetensors is not a complete LoRA file"):
        load_lora(path)
