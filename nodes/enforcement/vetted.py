"""Which guiders and samplers SafeCFG is known to follow, per ComfyUI version; every other one is refused until it is looked at.

A class or function is named by the file that defines it, below ComfyUI's folder: `comfy_extras/nodes_perpneg.py:Guider_PerpNeg`.
`tests/host/test_vetted.py` fails on a host that has one which is in neither table: read its code, then write it into one.
"""

import inspect
import os
import sys
from collections.abc import Collection
from functools import cache
from typing import Any

import comfy.samplers

from ..host.hooks import SafeCFGError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(inspect.getfile(comfy.samplers))))
OUR_PACKAGE = __package__.rpartition(".")[0]
KSAMPLING = "comfy/k_diffusion/sampling.py"

# What each version brought, from the oldest that is supported. A host of a version between two has the older one's list.
SINCE: tuple[tuple[tuple[int, int, int], str], ...] = (
    (
        (0, 3, 64),
        """
        comfy/samplers.py: CFGGuider ksampler
        comfy_extras/nodes_custom_sampler.py: Guider_Basic Guider_DualCFG
        comfy_extras/nodes_perpneg.py: Guider_PerpNeg
        comfy_extras/nodes_advanced_samplers.py: sample_lcm_upscale sample_euler_pp
        comfy/extra_samplers/uni_pc.py: sample_unipc sample_unipc_bh2
        comfy/k_diffusion/sampling.py: sample_ddpm sample_deis sample_dpm_2 sample_dpm_2_ancestral
            sample_dpmpp_2m sample_dpmpp_2m_cfg_pp sample_dpmpp_2m_sde sample_dpmpp_2m_sde_gpu sample_dpmpp_2m_sde_heun
            sample_dpmpp_2m_sde_heun_gpu sample_dpmpp_2s_ancestral sample_dpmpp_2s_ancestral_cfg_pp sample_dpmpp_3m_sde
            sample_dpmpp_3m_sde_gpu sample_dpmpp_sde sample_dpmpp_sde_gpu sample_er_sde sample_euler sample_euler_ancestral
            sample_euler_ancestral_cfg_pp sample_euler_cfg_pp sample_gradient_estimation sample_gradient_estimation_cfg_pp sample_heun
            sample_heunpp2 sample_ipndm sample_ipndm_v sample_lcm sample_lms sample_res_multistep sample_res_multistep_ancestral
            sample_res_multistep_ancestral_cfg_pp sample_res_multistep_cfg_pp sample_sa_solver sample_sa_solver_pece sample_seeds_2
            sample_seeds_3
        """,
    ),
    (
        (0, 4, 0),
        """
        comfy/k_diffusion/sampling.py: sample_exp_heun_2_x0 sample_exp_heun_2_x0_sde sample_ar_video
        comfy_extras/nodes_custom_sampler.py: Guider_DualModel
        comfy_extras/nodes_void.py: VOID_DDIM
        """,
    ),
    ((0, 31, 0), "comfy_extras/nodes_lt.py: Guider_LTXAVDualCFG"),
)
# Known, and refused: the nodes that make them are, too.
REFUSED = frozenset({"comfy_extras/nodes_train.py:TrainSampler", "comfy_extras/nodes_train.py:TrainGuider"})


def _names(text: str) -> set[str]:
    """`file: name name` lines as {"file:name"}; a line without a file goes on with the last one."""
    found, file = set(), ""
    for word in text.split():
        if word.endswith(":"):
            file = word
        else:
            found.add(f"{file}{word}")
    return found


def vetted(version: tuple[int, ...]) -> frozenset[str]:
    """The names that a host of this version may use."""
    return frozenset().union(*(_names(text) for since, text in SINCE if since <= version))


@cache
def host_version() -> tuple[int, ...]:
    """The host's version; of one that does not tell, the oldest that is supported."""
    text = getattr(sys.modules.get("comfyui_version"), "__version__", "")
    if not text:
        try:
            from comfyui_version import __version__

            text = __version__
        except ImportError:
            return SINCE[0][0]
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def name_of(thing: Any) -> str:
    """The name of a class or function, as in the tables; of one outside of ComfyUI's folder the whole path."""
    if isinstance(thing, type):
        file, name = getattr(sys.modules.get(thing.__module__), "__file__", None) or thing.__module__, thing.__qualname__
    else:
        code = inspect.unwrap(thing).__code__
        file, name = code.co_filename, getattr(thing, "__qualname__", thing.__name__)
    name = name.partition(".<locals>")[0]  # functions made inside of one: by the one that made them
    path = os.path.abspath(file)
    inside = path.startswith(ROOT + os.sep)
    return f"{os.path.relpath(path, ROOT).replace(os.sep, '/') if inside else path}:{name}"


def things_of(guider: object, sampler: object) -> list:
    """The class of a guider, and the class or function of a sampler."""
    function = getattr(sampler, "sampler_function", None)
    return [type(guider), type(sampler) if function is None else function]


def check_vetted(guider: object, sampler: object, allowed: Collection[str]) -> None:
    """Raises SafeCFGError for a guider or a sampler that is in no table, unless its pack, or a node of it, is `allowed`."""
    known = vetted(host_version())
    for thing in things_of(guider, sampler):
        name = name_of(thing)
        if name in known or getattr(thing, "__module__", "").startswith(f"{OUR_PACKAGE}.") or _is_allowed(name, allowed):
            continue
        raise SafeCFGError(
            f"SafeCFG (enforced): {name.rpartition(':')[2]} is a guider or sampler that nobody has looked at yet. Use another one, or ask "
            "whoever runs this server to allow it in SAFECFG_ENFORCE_ALLOW. [safecfg:not-vetted]"
        )


def _is_allowed(name: str, allowed: Collection[str]) -> bool:
    """Whether a class or function is of a pack that may run, or that has a node which may."""
    import nodes  # ComfyUI's

    from .enforced_graph import pack_of

    parts = name.rpartition(":")[0].replace("\\", "/").split("/custom_nodes/")
    if len(parts) < 2 and not name.startswith("custom_nodes/"):
        return False
    pack = (parts[-1] if len(parts) > 1 else name.removeprefix("custom_nodes/")).split("/")[0].removesuffix(".py")
    packs = {pack_of(nodes.NODE_CLASS_MAPPINGS[node]) for node in allowed if node in nodes.NODE_CLASS_MAPPINGS}
    return pack in allowed or pack in packs
