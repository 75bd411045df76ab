"""Other nodes on a model's path: their names, for errors that would otherwise blame the sampler."""

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import comfy.model_management
import comfy.samplers

from ... import hgr_models
from ..host.hooks import CFG, POST_CFG, PRE_CFG, SafeCFGError

OURS = __package__.removesuffix(".nodes.redirect")  # of the pack's modules
REPLACEABLE = ("sampling_function", "cfg_function", "calc_cond_batch")  # of comfy.samplers; some packs put their own there
PASSED = (
    SafeCFGError,
    hgr_models.HGRError,
    comfy.model_management.InterruptProcessingException,
    comfy.model_management.OOM_EXCEPTION,
)

logger = logging.getLogger(__name__)


def foreign_functions() -> list[str]:
    """Packs that replaced a function of core's sampling code for the whole process."""
    found = [getattr(comfy.samplers, name) for name in REPLACEABLE]
    return _names(function for function in found if _module(function) != "comfy.samplers")


def others_of(model_options: dict | None, guider: object | None = None, sampler: object | None = None) -> list[str]:
    """Names of the packs (of core's own nodes: of the modules) that hook into a run, without SafeCFG."""
    functions = list(_hooks(model_options or {}))
    functions += [part for part in (guider, sampler) if part is not None]
    return sorted({*_names(functions), *foreign_functions()})


def _hooks(model_options: dict) -> Iterator[object]:
    for name in (PRE_CFG, POST_CFG):
        yield from _values(model_options.get(name))
    for name in (CFG, "sampler_calc_cond_batch_function", "model_function_wrapper", "denoise_mask_function"):
        function = model_options.get(name)
        yield getattr(function, "_safecfg_wraps", function)
    options = model_options.get("transformer_options", {})
    for name in ("patches", "patches_replace", "wrappers", "callbacks"):
        yield from _values(options.get(name))


def _values(value: object) -> Iterator[object]:
    """What lists and dicts hold, at any depth."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for child in value:
        yield from _values(child)


def _names(values: Iterable[object]) -> list[str]:
    return sorted({name for value in values if value is not None and (name := _name(_module(value)))})


def _module(value: object) -> str:
    function = getattr(value, "func", value)  # of a partial
    return str(getattr(function, "__module__", None) or type(function).__module__)


def _name(module: str) -> str:
    """A pack's folder, or the module of one of core's nodes; "" for core's sampling code, Python's and ours."""
    if f"{module}.".startswith(f"{OURS}."):
        return ""
    if found := re.search(r"custom_nodes[/\\.]([^/\\.]+)", module):
        return found[1].replace("_x_", ".")
    return "" if module.partition(".")[0] in ("comfy", "builtins", "functools", "torch", "types") else module


def guarded(did: str, run_of_args: Callable) -> Callable:
    """Decorator of a hook: what goes wrong in it becomes an error of ours that names the other nodes on the path.

    `run_of_args` gives the hook's (model_options, guider) from its arguments.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def guard(*args, **kwargs) -> Any:
            try:
                return function(*args, **kwargs)
            except PASSED:
                raise
            except Exception as error:
                raise explained(error, did, *run_of_args(*args, **kwargs)) from error

        return guard

    return decorate


def explained(error: Exception, did: str, model_options: dict | None, guider: object | None = None) -> SafeCFGError:
    """The error for the user."""
    names = others_of(model_options, guider)
    where = f"Other nodes on this model's path: {', '.join(names)}. " if names else ""
    what_to_do = "Try without them, one by one" if names else "Try another sampler"
    return SafeCFGError(
        f"SafeCFG could not {did}: {type(error).__name__}: {error}. {where}{what_to_do}, and please report the graph; nothing was drawn "
        "unredirected."
    )
