"""The user's model as a frozen function that carries gradients from its prediction back to a prompt's tokens."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import hgr_models
from ...hgr_models.recording import Points, Prompts
from ..families import MASK, POOLED, TOKENS

OVERRIDE = "optimized_attention_override"  # core's own hook for another attention
STEPS = (0.02, 0.002)  # of the tokens' spread: how far the check of the gradient moves them
CONVINCING = 0.05  # an error after which no smaller step is tried


@contextmanager
def normal_weights(module: torch.nn.Module) -> Iterator[None]:
    """Weights that autograd accepts, for a while: a loader node runs in inference mode, and such tensors refuse a backward pass.

    They share the memory of the module's own tensors, which it gets back.
    """
    changed = []
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, value in store.items():
                if value is not None and _untracked(value):
                    changed.append((store, name, value))
                    normal = _shared(value)
                    store[name] = torch.nn.Parameter(normal, requires_grad=False) if store is part._parameters else normal
    try:
        yield
    finally:
        for store, name, value in changed:
            store[name] = value


def _untracked(value: Tensor) -> bool:
    """Whether autograd refuses a tensor: of inference mode, or with one of its halves from there, as after a move to a device."""
    try:
        value._version  # noqa: B018 (it raises)
    except RuntimeError:
        return True
    return value.is_inference()


def _shared(value: Tensor) -> Tensor:
    """An inference tensor's memory as a normal tensor; of a tensor class of its own (quantised weights), a copy."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        return value.detach().clone()
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    return empty.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())


@contextmanager
def checkpointed(module: torch.nn.Module) -> Iterator[None]:
    """Keeps only the inputs of a network's blocks for the backward pass, and computes the rest again."""
    blocks = list(_blocks(module))
    for block in blocks:
        block.forward = _checkpointed_forward(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is visible again


def _checkpointed_forward(forward):
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _blocks(module: torch.nn.Module, listed: bool = False) -> Iterator[torch.nn.Module]:
    """The largest modules inside lists of modules: residual and transformer blocks, whatever the architecture."""
    for child in module.children():
        is_list = isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential))
        if listed and not is_list and any(True for _ in child.parameters()) and "forward" not in vars(child):
            yield child
        else:
            yield from _blocks(child, is_list)


def differentiable_attention(_, *args, **kwargs) -> Tensor:
    """Torch's own attention, whatever the host was started with: some of the others have no backward pass."""
    kwargs.pop("transformer_options", None)
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def _is_dynamic(model) -> bool:
    return getattr(model, "is_dynamic", bool)()


def check_can_freeze(model) -> None:
    """Raises HGRError for a MODEL whose weights core cannot load whole beside its dynamic VRAM."""
    if _is_dynamic(model) and model.cached_patcher_init is None:
        raise hgr_models.HGRError(
            "Gradients need all of the model's weights at once, but its loader does not tell ComfyUI how to load them again. Load the "
            "model with ComfyUI's own loaders (Load Checkpoint, Load Diffusion Model), or start ComfyUI with --disable-dynamic-vram."
        )


class FrozenModel:
    """A MODEL, fully loaded, in which nothing learns; use it inside `loaded`."""

    def __init__(self, model, template: dict):
        """`template`: the keys of a condition beside tokens, pooled and mask, such as Flux's guidance."""
        check_can_freeze(model)
        self.model = model.clone(disable_dynamic=True) if _is_dynamic(model) else model.clone()
        self.template = {k: _normal(v) for k, v in template.items() if k not in (TOKENS, POOLED, MASK)}
        self.options: dict = {}
        self.inner = None

    @property
    def half(self) -> bool:
        """Whether the model computes in fp16, whose gradients need a scaled loss."""
        computes = self.model.get_model_object("manual_cast_dtype")  # None: in the weights' own type
        return (self.model.model_dtype() if computes is None else computes) == torch.float16

    @contextmanager
    def loaded(self, shape: tuple[int, ...], checkpointing: bool) -> Iterator["FrozenModel"]:
        """Loads all weights, and makes the model differentiable for a batch of latents of a shape."""
        needed = 3 * self.model.memory_required(list(shape))  # a backward pass keeps what a forward pass lets go of
        comfy.model_management.load_models_gpu([self.model], memory_required=needed, force_full_load=True)
        self.inner = self.model.model
        self.options = _options(self.model)
        network = self.inner.diffusion_model
        trained = [p for p in network.parameters() if p.requires_grad and not _untracked(p)]
        try:
            self.model.pre_run()
            for p in trained:
                p.requires_grad_(False)
            with normal_weights(self.inner):
                if checkpointing:
                    with checkpointed(network):
                        yield self
                else:
                    yield self
        finally:
            for p in trained:
                p.requires_grad_(True)
            self.model.cleanup()
            self.inner = None

    def predict(self, points: Points, prompts: Prompts, tokens: Tensor, pooled: Tensor | None) -> Tensor:
        """x0 prediction (B, C, *spatial) float32 for recorded points with tokens (B, T, D); gradients reach tokens and pooled."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        condition = {**self.template, TOKENS: tokens, **({} if pooled is None else {POOLED: pooled})}
        if prompts.mask is not None:
            condition[MASK] = prompts.mask
        condition["model_conds"] = {}
        conds = {"positive": [comfy.sampler_helpers.convert_cond([[tokens, condition]])[0]]}
        device = self.model.load_device
        x, sigma = points.x.to(device), points.sigma.to(device)
        encoded = comfy.samplers.process_conds(self.inner, x, conds, device, torch.zeros_like(x))
        with _current(device):
            return comfy.samplers.calc_cond_batch(self.inner, [encoded["positive"]], x, sigma, self.options)[0]


def _current(device: torch.device):
    """Core's context in which kernels run on a device that is not the first GPU; hosts without it have only one."""
    context = getattr(comfy.model_management, "cuda_device_context", None)
    return nullcontext() if context is None else context(device)


def _normal(value):
    return value.clone() if isinstance(value, Tensor) else value


def _options(model) -> dict:
    """The model's own options with an attention that has a backward pass, without hooks on the guidance."""
    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    transformer = {**options.get("transformer_options", {}), OVERRIDE: differentiable_attention}
    return {"transformer_options": transformer}


def gradient_error(frozen: FrozenModel, points: Points, prompts: Prompts) -> float:
    """How far the gradient of a loss at the tokens is from its finite difference, relative: 0 is exact, 1 or more is wrong.

    Large where a model's layers cut the graph, or give wrong gradients in silence. The smaller of two errors: a large step
    drowns rounding, a small one curvature.
    """
    tokens, generator = prompts.tokens.clone().requires_grad_(True), torch.Generator().manual_seed(0)
    weights = torch.randn(points.x.shape, generator=generator).to(points.x)
    loss = lambda t: (frozen.predict(points, prompts, t, prompts.pooled).cpu().double() * weights).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(tokens), tokens)
    # Half along the gradient, where there is most to see, and half at random, where a gradient of 0 would be seen.
    other = torch.randn(tokens.shape, generator=generator).to(tokens)
    direction = gradient / gradient.norm().clamp(min=1e-20) + other / other.norm()
    direction = direction * tokens.detach().std() * tokens.numel() ** 0.5 / direction.norm()
    error = float("inf")
    for step in STEPS:
        move = step * direction
        with torch.no_grad():
            found = float(loss(tokens + move) - loss(tokens - move))
        expected = float(2 * (gradient * move).sum())
        error = min(error, abs(found - expected) / max(abs(found), abs(expected), 1e-20))
        if error < CONVINCING:
            break
    return error
