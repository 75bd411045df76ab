"""Blocks that are computed again for the backward pass: in-place additions, shared options, other devices, and kernels."""

import comfy.model_management
import pytest
import torch
from safecfg.nodes.training import frozen_model
from safecfg.nodes.training.recompute import PlainKernels, recomputed


class Block(torch.nn.Module):
    """As core's blocks are: adds in place to its input and to a normalised copy that its gradient needs."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x, options):
        normed = torch.nn.functional.layer_norm(x, (4,))
        h = torch.sigmoid(normed)  # whose gradient needs its own output
        h.mul_(2.0)
        x += self.inner(h) * options["scale"]
        return x


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        options = {}
        for i, block in enumerate(self.blocks):
            options["scale"] = 1.0 + i  # the next block changes what this one was given
            x = block(x.clone() if i == 0 else x, options)
        return x


def by_hand(net, x):
    """The same without in-place additions."""
    for i, block in enumerate(net.blocks):
        x = x + block.inner(2 * torch.sigmoid(torch.nn.functional.layer_norm(x, (4,)))) * (1.0 + i)
    return x


def test_gradients_of_blocks_that_add_in_place_are_right():
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(by_hand(net, x).square().sum(), x)
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(net(x).square().sum(), x)
    with recomputed(net):
        for _ in range(2):  # the second time a block's ways are known
            (found,) = torch.autograd.grad(net(x).square().sum(), x)
            torch.testing.assert_close(found, expected)
    assert "forward" not in vars(net.blocks[0])


def test_weights_inside_a_block_learn_although_its_inputs_need_no_gradient():
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(3, 4)
    expected = torch.autograd.grad(by_hand(net, x).square().sum(), list(net.parameters()))
    with recomputed(net):
        net(x).square().sum().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_weights_are_in_place_for_both_passes_and_away_between_them():
    torch.manual_seed(0)
    net, held = Net().requires_grad_(False), []

    class Placed:
        def __init__(self, block):
            self.block = block

        def __enter__(self):
            held.append(net.blocks.__iter__ and [b is self.block for b in net.blocks].index(True))

        def __exit__(self, *_):
            return None

    x = torch.randn(3, 4, requires_grad=True)
    with recomputed(net, Placed):
        loss = net(x).square().sum()
        assert held == [0, 1]
        loss.backward()
    assert set(held[2:]) == {0, 1} and held[2] == 1  # the last block first


def test_core_s_flag_is_set_for_the_time_of_training_and_put_back():
    if not hasattr(comfy.model_management, "in_training"):
        with frozen_model.in_training():
            assert not hasattr(comfy.model_management, "in_training")
        return
    with pytest.raises(KeyError), frozen_model.in_training():
        assert comfy.model_management.in_training is True
        raise KeyError
    assert comfy.model_management.in_training is False


def test_rotary_kernels_without_a_backward_pass_are_computed_by_torch():
    kitchen = pytest.importorskip("comfy_kitchen")
    x = torch.randn(1, 3, 2, 8, requires_grad=True)
    angle = torch.randn(1, 3, 1, 4)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))
    for name in ("apply_rope1", "apply_rope_split_half1"):
        kernel = getattr(kitchen, name, None)
        if kernel is None:
            continue
        with PlainKernels():
            out = kernel(x, rotation)
        torch.testing.assert_close(out.detach(), kernel(x.detach(), rotation))
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        torch.testing.assert_close(gradient, 2 * x.detach())  # a rotation keeps the length
