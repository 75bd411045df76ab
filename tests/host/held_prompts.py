"""Stand-ins for nodes of other packs that keep prompts where core does not look: each draws its tokens beside the prompt's.

`HOLDERS`: by how the tokens are held, (model, conditioning, tokens) -> (model, conditioning).
"""

import dataclasses
import functools

import comfy.conds
import comfy.hooks
import torch
from comfy.patcher_extension import WrappersMP

AMOUNT = 0.5  # of the held prompt in what the model reads


def mixed(context, tokens, rows: list[int]):
    """The model's context (B, T, D) with held tokens in the rows of the prompt, as regional nodes mix them."""
    chunks = list(context.chunk(len(rows)))
    for i, row in enumerate(rows):
        if row == 0:
            chunks[i] = chunks[i] + AMOUNT * tokens.to(context).expand_as(chunks[i])
    return torch.cat(chunks)


def attn2_patch(read):
    """A patch that reads its tokens at every call."""

    def patch(q, k, v, extra_options):
        context = mixed(k, read(), extra_options["cond_or_uncond"])
        return q, context, context

    return patch


class Region:
    """A pack's own object; `patch` is bound to it."""

    def __init__(self, tokens):
        self.conds = [("whole picture", tokens)]

    def patch(self, q, k, v, extra_options):
        context = mixed(k, self.conds[0][1], extra_options["cond_or_uncond"])
        return q, context, context


@dataclasses.dataclass(frozen=True)
class Part:
    tokens: torch.Tensor
    mask: torch.Tensor


def closure(model, conditioning, tokens):
    held = {"cond": tokens}
    model = model.clone()
    model.set_model_attn2_patch(attn2_patch(lambda: held["cond"]))
    return model, conditioning


def bound_method(model, conditioning, tokens):
    model = model.clone()
    model.set_model_attn2_patch(Region(tokens).patch)
    return model, conditioning


def partial(model, conditioning, tokens):
    def patch(conds, q, k, v, extra_options):
        context = mixed(k, conds[0].tokens, extra_options["cond_or_uncond"])
        return q, context, context

    model = model.clone()
    model.set_model_attn2_patch(functools.partial(patch, (Part(tokens, torch.ones(1, 16, 16)),)))
    return model, conditioning


def function_wrapper(model, conditioning, tokens):
    def wrapper(apply_model, args):
        context = mixed(args["c"]["c_crossattn"], tokens, args["cond_or_uncond"])
        return apply_model(args["input"], args["timestep"], **{**args["c"], "c_crossattn": context})

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model, conditioning


def transformer_options(model, conditioning, tokens):
    """Tokens beside the patch that uses them."""

    def patch(q, k, v, extra_options):
        context = mixed(k, extra_options["regions"]["a"], extra_options["cond_or_uncond"])
        return q, context, context

    model = model.clone()
    model.model_options["transformer_options"]["regions"] = {"a": tokens}
    model.set_model_attn2_patch(patch)
    return model, conditioning


def patch_that_comes_later(model, conditioning, tokens):
    """A wrapper makes the tokens and puts the patch in when the run is under way."""
    held, written = Region(None), tokens.numpy().tobytes()

    def predict_noise(executor, x, timestep, model_options, *args):
        held.conds = [("whole picture", torch.frombuffer(bytearray(written), dtype=torch.float32).view(2, -1, 16))]
        options = model_options["transformer_options"]
        options["patches"] = {**options.get("patches", {}), "attn2_patch": [held.patch]}
        return executor(x, timestep, model_options, *args)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "held", predict_noise)
    return model, conditioning


def hook_of_a_condition(model, conditioning, tokens):
    hook = comfy.hooks.TransformerOptionsHook({"patches": {"attn2_patch": [Region(tokens).patch]}})
    hook.hook_scope = comfy.hooks.EnumHookScope.HookedOnly
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return model, comfy.hooks.set_hooks_for_conditioning(conditioning, group)


def object_in_a_condition(model, conditioning, tokens):
    """A patch reads it from the guider's conditions."""
    held = [[cross_attn, {**extras, "regions": Region(tokens)}] for cross_attn, extras in conditioning]
    seen = {}

    def predict_noise(executor, x, timestep, *args):
        seen["region"] = executor.class_obj.conds["positive"][0]["regions"]
        return executor(x, timestep, *args)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "held", predict_noise)
    model.set_model_attn2_patch(lambda q, k, v, extra: seen["region"].patch(q, k, v, extra))
    return model, held


HOLDERS = {
    "a closure": closure,
    "a bound method": bound_method,
    "a partial function": partial,
    "a model function wrapper": function_wrapper,
    "transformer options": transformer_options,
    "a patch that comes later": patch_that_comes_later,
    "a hook of a condition": hook_of_a_condition,
    "an object in a condition": object_in_a_condition,
}
