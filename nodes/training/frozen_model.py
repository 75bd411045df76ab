"""The user's model as a frozen function that carries gradients from its prediction back to a prompt's tokens."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ... import hgr_models
from ..host.architecture import architecture_of
from ..host.encoding import LENGTHS, WIDTH
from ..host.families import POOLED, latents_of
from ..host.more_tokens import BYT5, MASK, MORE, TOKENS, shapes_in, split
from ..host.packed_latents import Part, part_for
from .recompute import PlainKernels, recomputed
from .streaming import Streaming

OVERRIDE = "optimized_attention_override"  # core's own hook for another attention
BATCH_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)  # of models that take one row at a time
OTHER_WIDTH = (
    "mat1 and mat2 shapes cannot be multiplied",
    "normalized_shape",
    "expanded size of the tensor",
)  # torch's words for it
ROOM = 0.9  # of a device's memory: the rest is torch's own and other programs'


@contextmanager
def normal_weights(module: torch.nn.Module) -> Iterator[None]:
    """Weights that autograd accepts, for a while: a loader node runs in inference mode, and such tensors refuse a backward pass.

    They share the memory of the module's own tensors, which it gets back.
    """
    changed: list[tuple[dict, str, Tensor]] = []
    for part in module.modules():
        stores: tuple[dict, dict] = (part._parameters, part._buffers)
        for store in stores:
            for name, value in store.items():
                if value is not None and _untracked(value):
                    changed.append((store, name, value))
                    normal = _shared(value)
                    store[name] = torch.nn.Parameter(normal, requires_grad=False) if store is part._parameters else normal
    try:
        yield
    finally:
        for store, name, kept in changed:
            store[name] = kept


def _untracked(value: Tensor) -> bool:
    """Whether autograd refuses a tensor: of inference mode, or with one of its halves from there, as after a move to a device."""
    try:
        value._version  # noqa: B018 (it raises)
    except RuntimeError:
        return True
    return value.is_inference()


def _shared(value: Tensor) -> Tensor:
    """An inference tensor's memory as a normal tensor; of a tensor class that holds others (core's quantised weights), a copy."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        copy = value.detach().clone()
        if not _untracked(copy):
            return copy
        # A class whose copy is itself (GGUF's packed weights): its memory, with what it says of itself.
        normal = _shared(value.as_subclass(Tensor)).as_subclass(type(value))
        vars(normal).update(vars(value))
        return normal
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    return empty.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())


@contextmanager
def as_made(model: ModelPatcher) -> Iterator[None]:
    """The mode in which a MODEL's weights were made, for a while: core makes quantised ones anew where it moves them.

    Those that were made in another mode could not be moved in this one, by the next sampler.
    """
    with torch.inference_mode(any(p.is_inference() for p in model.model.parameters())):
        yield


@contextmanager
def in_training() -> Iterator[None]:
    """Core's own flag that gradients are needed, which leaves out kernels without a backward pass, for a while."""
    before = getattr(comfy.model_management, "in_training", None)  # ComfyUI 0.3.64 has no such kernels
    if before is not None:
        comfy.model_management.in_training = True
    try:
        yield
    finally:
        if before is not None:
            comfy.model_management.in_training = before


def differentiable_attention(chosen: Callable, *args, **kwargs) -> Tensor:
    """Torch's own attention, whatever the host was started with: some of the others have no backward pass."""
    kwargs.pop("transformer_options", None)
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def _is_dynamic(model: ModelPatcher) -> bool:
    return getattr(model, "is_dynamic", bool)()


def check_can_freeze(model: ModelPatcher) -> None:
    """Raises HGRError for a MODEL whose weights core cannot load whole beside its dynamic VRAM."""
    if _is_dynamic(model) and model.cached_patcher_init is None:
        raise hgr_models.HGRError(
            "Gradients need all of the model's weights at once, but its loader does not tell ComfyUI how to load them again. Load the "
            "model with ComfyUI's own loaders (Load Checkpoint, Load Diffusion Model), or start ComfyUI with --disable-dynamic-vram."
        )


class Latents(Protocol):
    """What `predict` asks of points: noised latents x (B, C, *spatial) and their sigma (B,)."""

    x: Tensor
    sigma: Tensor


class Masks(Protocol):
    """What `predict` asks of prompts: mask (B, T) and lengths (B,), or None."""

    mask: Tensor | None
    lengths: Tensor | None


class FrozenModel:
    """A MODEL, fully loaded, in which nothing learns; use it inside `loaded`."""

    def __init__(self, model: ModelPatcher, template: dict, latent: Tensor | None = None, limit: int | None = None):
        """`template`: the keys of a condition beside tokens, pooled and mask, such as Flux's guidance.

        `latent`: nested latents of one run, for a model of audio and video; only their shapes count. `limit`: bytes of the
        device that weights and backward pass may take together; None: all of it.
        """
        check_can_freeze(model)
        self.model = model.clone(disable_dynamic=True) if _is_dynamic(model) else model.clone()
        self.shapes = [tuple(t.shape[1:]) for t in latent.unbind()] if getattr(latent, "is_nested", False) else []
        self.limit = limit
        self.streaming: Streaming | None = None
        self.takes_batches: bool | None = None  # None: not tried yet
        self.width = template.get(WIDTH, 0)
        self.has_mask = MASK in template
        self.has_pooled = POOLED in template  # core's HunyuanVideo 1.5 reads the key where it holds nothing
        self.template = {k: _normal(v) for k, v in template.items() if k not in (TOKENS, POOLED, MASK, WIDTH, LENGTHS, BYT5)}
        self.options: dict = {}
        self.inner: BaseModel | None = None

    @property
    def half(self) -> bool:
        """Whether the model computes in fp16, whose gradients need a scaled loss."""
        computes = self.model.get_model_object("manual_cast_dtype")  # None: in the weights' own type
        return (self.model.model_dtype() if computes is None else computes) == torch.float16

    def needed(self, shape: tuple[int, ...]) -> int:
        """Bytes that a backward pass takes beside the weights: it keeps what a forward pass lets go of."""
        return int(3 * self.model.memory_required(list(shape)))

    def streams(self, shape: tuple[int, ...]) -> bool:
        """Whether the weights do not fit on the device beside a backward pass, so that blocks come one by one."""
        device = self.model.load_device
        if self.limit is None and device.type == "cpu":
            return False
        limit = comfy.model_management.get_total_memory(device) if self.limit is None else self.limit
        return self.model.model_size() + self.needed(shape) > ROOM * limit

    @contextmanager
    def _weights(self, shape: tuple[int, ...], checkpointing: bool) -> Iterator[None]:
        """The weights where they are needed, for a while, and blocks that keep only their inputs."""
        network = self.inner.diffusion_model
        if not self.streams(shape):
            needed = self.needed(shape)
            with as_made(self.model):
                comfy.model_management.load_models_gpu([self.model], memory_required=needed, force_full_load=True)
            with normal_weights(self.inner), recomputed(network) if checkpointing else nullcontext():
                yield
            return
        with as_made(self.model):
            comfy.model_management.free_memory(1e32, self.model.load_device)
            self.model.patch_model(self.model.offload_device)  # with its LoRAs, where it lies
        self.streaming = streaming = Streaming(self.model.load_device)
        try:
            around = streaming.around(self.inner, network)
            with around, normal_weights(self.inner), recomputed(network, streaming.place):
                yield
        finally:
            with as_made(self.model):
                self.model.unpatch_model(self.model.offload_device)

    @contextmanager
    def loaded(self, shape: tuple[int, ...], checkpointing: bool) -> Iterator["FrozenModel"]:
        """Loads the weights, and makes the model differentiable for a batch of latents of a shape.

        Weights that do not fit beside the backward pass stay where they are, and blocks are brought to the device one by one.
        """
        self.inner = self.model.model
        self.options = _options(self.model)
        trained: list[torch.nn.Parameter] = []
        try:
            with in_training(), self._weights(shape, checkpointing):
                self.model.pre_run()
                trained += [p for p in self.inner.diffusion_model.parameters() if p.requires_grad]
                for p in trained:
                    p.requires_grad_(False)
                yield self
        finally:
            for p in trained:
                p.requires_grad_(True)
            self.model.cleanup()
            self.inner = None

    def predict(self, points: Latents, prompts: Masks, tokens: Tensor, pooled: Tensor | None) -> Tensor:
        """x0 prediction (B, C, *spatial) float32 for recorded points with tokens (B, T, D); gradients reach tokens and pooled.

        `prompts` tells masks and lengths: the model never sees padding.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        lengths, rest = getattr(prompts, "lengths", None), getattr(points, "rest", None)
        if lengths is None or prompts.mask is None:
            return self._evaluate(points.x, points.sigma, tokens, pooled, prompts.mask, rest)
        cut = lambda t, rows: None if t is None else t[rows]  # noqa: E731
        found: list[Tensor | None] = [None] * len(tokens)
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero()[:, 0].to(tokens.device)
            whole = prompts.mask[rows.to(prompts.mask.device), :length]
            mask = whole if self.has_mask or not bool(whole.all()) else None  # as core, which drops one that masks nothing
            there = rows.to(points.x.device)
            part = self._evaluate(
                points.x[there], points.sigma[there], tokens[rows, :length], cut(pooled, rows), mask, cut(rest, there)
            )
            for row, one in zip(rows.tolist(), part.split(1), strict=True):
                found[row] = one
        return torch.cat(found)

    def _evaluate(self, *columns: Tensor | None) -> Tensor:
        """All rows at once, or one by one where the network takes no batches; `columns` as in `_evaluate_batch`."""
        if len(columns[0]) == 1 or self.takes_batches is False:
            rows = [None if t is None else t.split(1) for t in columns]
            each = [self._evaluate_batch(*(None if r is None else r[i] for r in rows)) for i in range(len(columns[0]))]
            return torch.cat(each)
        try:
            found = self._evaluate_batch(*columns)
        except BATCH_ERRORS as error:
            if self.takes_batches or isinstance(error, torch.OutOfMemoryError):
                raise
            self.takes_batches = False
            return self._evaluate(*columns)
        self.takes_batches = True
        return found

    def _evaluate_batch(
        self, x: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor | None, mask: Tensor | None, rest: Tensor | None
    ) -> Tensor:
        parts = self._parts(tokens)
        masks = (
            {} if mask is None else split(mask.long()[..., None], {key: (1, *part.shape[1:-1], 1) for key, part in parts.items()})
        )
        tokens, mask = parts[TOKENS], masks.get(TOKENS)
        condition = {**self.template, **parts, **({} if pooled is None and not self.has_pooled else {POOLED: pooled})}
        condition |= {MORE[key]: value[..., 0] for key, value in masks.items() if MORE.get(key)}
        if mask is not None:
            condition[MASK] = mask[..., 0]  # whole numbers, as encoders give it: some networks take floats for a bias
        condition["model_conds"] = {}
        conds = {"positive": [comfy.sampler_helpers.convert_cond([[tokens, condition]])[0]]}
        device = self.model.load_device
        part, shapes = self._part(len(x))
        x, sigma = part.join(x, rest).to(device), sigma.to(device)
        packed = {} if shapes is None else {"latent_shapes": shapes}
        encoded = comfy.samplers.process_conds(self.inner, x, conds, device, torch.zeros_like(x), seed=0, **packed)
        # A model of mean flows asks for the next noise level, too: the end.
        transformer = {
            **self.options["transformer_options"],
            "sample_sigmas": torch.stack([sigma[0], torch.zeros_like(sigma[0])]),
        }
        with _current(device), PlainKernels():
            denoised = comfy.samplers.calc_cond_batch(
                self.inner, [encoded["positive"]], x, sigma, {**self.options, "transformer_options": transformer}
            )[0]
        return part.take(denoised)

    def _parts(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens (B, N, D) by the key of a condition that they belong to."""
        quotes = getattr(self.inner.diffusion_model, "byt5_in", None) is not None
        return split(tokens, shapes_in(tokens, self.template, self.width or tokens.shape[-1], quotes))

    def _part(self, count: int) -> tuple[Part, list[tuple[int, ...]] | None]:
        """Where packed latents hold the picture, and the shapes of all; None: they are not packed."""
        if not self.shapes:
            return Part(), None
        shapes = [(count, *shape) for shape in self.shapes]
        x = torch.empty(count, 1, sum(math.prod(shape) for shape in self.shapes), device="meta")
        part = part_for(x, shapes, latents_of(self.model))
        if part is None:
            raise hgr_models.HGRError(
                f"Expected latents of which one is this model's picture, but got the shapes {self.shapes}. Connect an empty latent that "
                "was made for this model."
            )
        return part, shapes


def _current(device: torch.device) -> AbstractContextManager:
    """Core's context in which kernels run on a device that is not the first GPU; hosts without it have only one."""
    context = getattr(comfy.model_management, "cuda_device_context", None)
    return nullcontext() if context is None else context(device)


def _normal(value: object) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _options(model: ModelPatcher) -> dict:
    """The model's own options with an attention that has a backward pass, without hooks on the guidance."""
    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    transformer = {**options.get("transformer_options", {}), OVERRIDE: differentiable_attention}
    return {"transformer_options": transformer}


class OtherClipError(hgr_models.HGRError):
    """A network cannot read the prompts of a CLIP."""


@contextmanager
def reading(model: ModelPatcher, tokens: Tensor, always: bool = False) -> Iterator[None]:
    """Says that a CLIP belongs to another model where a network cannot read its tokens (B, T, D). Raises HGRError.

    `always`: whatever else breaks is told as that, too, since nothing but the prompt is new to the model.
    """
    try:
        yield
    except (comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError, hgr_models.HGRError):
        raise
    except Exception as error:
        if not always and not any(words in str(error) for words in OTHER_WIDTH):
            raise
        raise OtherClipError(
            f"{architecture_of(model)} cannot read this CLIP's prompts, whose tokens are {tokens.shape[-1]} wide ({first_line(error)}). "
            "Connect the CLIP that belongs to the model; KSampler then draws with both."
        ) from error


def first_line(error: Exception) -> str:
    """An exception's type and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else 'no message'}"
