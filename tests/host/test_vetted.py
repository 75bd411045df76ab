"""Server-wide enforcement: every guider and sampler of this host is in one of the two tables."""

import importlib
import re

import comfy.samplers
import pytest
from safecfg.nodes.enforcement import vetted
from safecfg.nodes.host.hooks import SafeCFGError

from host_nodes import HOST

DEFINES = re.compile(r"^class \w+\([\w.]*(Guider\w*|Sampler)\):", re.MULTILINE)


def subclasses(cls) -> set[type]:
    found = set()
    for child in cls.__subclasses__():
        found |= {child, *subclasses(child)}
    return found


def of_this_host() -> set[str]:
    """The names of everything in ComfyUI's folder that guides or samples."""
    for file in sorted((HOST / "comfy_extras").glob("nodes_*.py")):
        if DEFINES.search(file.read_text(encoding="utf-8")):
            importlib.import_module(f"comfy_extras.{file.stem}")
    things = [comfy.samplers.CFGGuider, *subclasses(comfy.samplers.CFGGuider), *subclasses(comfy.samplers.Sampler)]
    things += [comfy.samplers.sampler_object(name).sampler_function for name in comfy.samplers.SAMPLER_NAMES]
    names = {vetted.name_of(thing) for thing in things if thing is not comfy.samplers.KSAMPLER}
    return {name for name in names if not name.startswith("/")}


def test_everything_of_this_host_has_been_looked_at():
    """A new one: read its code. Does it call the model through the guider only? Does it draw the negative for any value?"""
    assert sorted(of_this_host() - vetted.vetted(vetted.host_version()) - vetted.REFUSED) == []


def test_the_table_names_nothing_that_this_host_does_not_have():
    missing = vetted.vetted(vetted.host_version()) - of_this_host()
    made_by_nodes = ("sample_lcm_upscale", "sample_euler_pp", "sample_ar_video", "Guider_DualModel")
    assert {name for name in missing if not name.endswith(made_by_nodes)} <= {
        f"{vetted.KSAMPLING}:{name}" for name in ("sample_exp_heun_2_x0", "sample_exp_heun_2_x0_sde")
    }


def test_versions():
    old, new = vetted.vetted((0, 3, 64)), vetted.vetted((0, 33, 0))
    assert old < new and "comfy_extras/nodes_lt.py:Guider_LTXAVDualCFG" in new - vetted.vetted((0, 30, 9))
    assert not vetted.REFUSED & new


class Unknown(comfy.samplers.CFGGuider):
    pass


def test_what_nobody_looked_at_is_refused(tiny_model):
    euler = comfy.samplers.sampler_object("euler")
    vetted.check_vetted(comfy.samplers.CFGGuider(tiny_model), euler, ())
    with pytest.raises(SafeCFGError, match="Unknown.*not-vetted"):
        vetted.check_vetted(Unknown(tiny_model), euler, ())
    theirs = comfy.samplers.KSAMPLER(lambda model, x, sigmas, **kwargs: x)
    with pytest.raises(SafeCFGError, match="SAFECFG_ENFORCE_ALLOW"):
        vetted.check_vetted(comfy.samplers.CFGGuider(tiny_model), theirs, ())


def test_those_of_allowed_packs_may_run(monkeypatch):
    assert vetted._is_allowed("/x/custom_nodes/their-pack/samplers.py:S", {"their-pack"})
    assert vetted._is_allowed("/x/custom_nodes/theirs.py:S", {"theirs"})
    assert not vetted._is_allowed("/x/custom_nodes/other/samplers.py:S", {"their-pack"})
    assert not vetted._is_allowed("/x/site-packages/their-pack/samplers.py:S", {"their-pack"})
