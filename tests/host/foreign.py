"""Stand-ins for packs that put their own code in the place of core's sampling function, samplers or guiders.

Each is written as such packs are seen to be; none is copied.
"""

import comfy.samplers
import torch


def fewer_keys(model, x, timestep, uncond, cond, cond_scale, model_options=None, seed=None, **_):
    """CFG hooks get what this code knows: no `input_cond`, no `cond_scale` after CFG."""
    conds = [cond, None if cond_scale == 1.0 else uncond]
    out = comfy.samplers.calc_cond_batch(model, conds, x, timestep, model_options)
    common = {"input": x, "sigma": timestep, "timestep": timestep, "model": model, "model_options": model_options}
    for function in model_options.get("sampler_pre_cfg_function", []):
        out = function({**common, "conds": conds, "conds_out": out, "cond_scale": cond_scale})
    both = {"cond_denoised": out[0], "uncond_denoised": out[1]}
    if "sampler_cfg_function" in model_options:
        terms = {"cond": x - out[0], "uncond": x - out[1], "cond_scale": cond_scale}
        result = x - model_options["sampler_cfg_function"]({**common, **both, **terms})
    else:
        result = out[1] + (out[0] - out[1]) * cond_scale
    for function in model_options.get("sampler_post_cfg_function", []):
        result = function({**common, **both, "denoised": result, "cond": cond, "uncond": uncond})
    return result


def ignoring(model, x, timestep, uncond, cond, cond_scale, model_options=None, seed=None, **_):
    """Calls the hooks, and goes on with its own tensors."""
    conds = [cond, uncond]
    out = comfy.samplers.calc_cond_batch(model, conds, x, timestep, model_options)
    for function in model_options.get("sampler_pre_cfg_function", []):
        arguments = {
            "conds": conds,
            "conds_out": list(out),
            "cond_scale": cond_scale,
            "timestep": timestep,
            "input": x,
            "sigma": timestep,
        }
        function({**arguments, "model": model, "model_options": model_options})
    return out[1] + (out[0] - out[1]) * cond_scale


def withholding(model, x, timestep, uncond, cond, cond_scale, model_options=None, seed=None, **_):
    """Lets core draw the negative alone, and computes the prompt later, where no hook looks."""
    conds = [None, uncond]
    out = comfy.samplers.calc_cond_batch(model, conds, x, timestep, model_options)
    for function in model_options.get("sampler_pre_cfg_function", []):
        arguments = {
            "conds": conds,
            "conds_out": out,
            "cond_scale": cond_scale,
            "timestep": timestep,
            "input": x,
            "sigma": timestep,
        }
        out = function({**arguments, "model": model, "model_options": model_options})
    (drawn,) = comfy.samplers.calc_cond_batch(model, [cond], x, timestep, model_options)
    return comfy.samplers.cfg_function(model, drawn * 0, out[1], 1.0, x, timestep, model_options, cond, uncond) * 0 + drawn


def stacked(weights):
    """All predictions of a prompt's parts go through the pre-CFG hooks at once, whose answer is dropped; then one by one through CFG."""

    def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options=None, seed=None, **_):
        each = comfy.samplers.calc_cond_batch(model, [[c] for c in cond] + [uncond], x, timestep, model_options)
        parts, uncond_denoised = each[:-1], each[-1]
        for function in model_options.get("sampler_pre_cfg_function", []):
            arguments = {"conds": [cond, uncond], "conds_out": [torch.cat(parts), uncond_denoised], "cond_scale": cond_scale}
            arguments |= {"timestep": timestep, "input": x, "sigma": timestep, "model": model, "model_options": model_options}
            function(arguments)
        result = uncond_denoised
        for part, weight in zip(parts, weights, strict=True):
            one = comfy.samplers.cfg_function(
                model, part, uncond_denoised, cond_scale * weight, x, timestep, model_options, cond, uncond
            )
            result = result + one - uncond_denoised
        return result

    return sampling_function


class AsksTheModel(comfy.samplers.Sampler):
    """A sampler that evaluates the prompt itself, past the guider; `asks`: whether it asks the guider, too."""

    def __init__(self, asks: bool, options: bool = True):
        self.asks, self.options = asks, options

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        x, sigma = noise * sigmas[0], sigmas[0] * noise.new_ones(len(noise))
        if self.asks:
            model_wrap(x, sigma, **extra_args)
        options = extra_args["model_options"] if self.options else {"transformer_options": {}}
        return comfy.samplers.calc_cond_batch(model_wrap.inner_model, [model_wrap.conds["positive"]], x, sigma, options)[0]
