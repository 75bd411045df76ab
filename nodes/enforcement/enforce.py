"""Server-wide enforcement: with SAFECFG_ENFORCE=<HGR file>, no prompt that is queued samples without SafeCFG.

ComfyUI swallows exceptions of prompt handlers and goes on with the prompt as it was. So whatever goes wrong here turns into another
prompt, of one node that never validates: ComfyUI then answers 400 with the reason, and nothing runs.
"""

import logging
import os
from dataclasses import dataclass
from functools import cache
from numbers import Real

import folder_paths
from comfy_api.latest import io

from ... import hgr_models
from ..loader import FOLDER, HGRModel, load_hgr_model, register_folder
from ..redirect.runs import SafeCFGError
from ..reporting.meter import current_server
from ..schema import make_input, make_schema
from .enforced_graph import GUARD, REFUSED, check_nodes, rewrite
from .enforced_model import enforced, one_per_family

VARIABLE, ALLOW = "SAFECFG_ENFORCE", "SAFECFG_ENFORCE_ALLOW"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Enforcement:
    """What the environment asks for. The HGRs are read once: a file that changes later changes nothing."""

    hgrs: tuple[HGRModel, ...]
    allowed: frozenset[str]
    problem: str = ""  # why no prompt can run


@cache
def enforcement() -> Enforcement | None:
    """What is enforced in this process; None where the variable is not set."""
    if VARIABLE not in os.environ:
        return None
    allowed = frozenset(_names(os.environ.get(ALLOW, "")))
    try:
        hgrs = tuple(one_per_family([load_hgr_model(_path(name)) for name in _names(os.environ[VARIABLE])]))
        if not hgrs:
            raise hgr_models.HGRError(f"{VARIABLE} is set, but empty. Name an HGR file, or unset it.")
    except Exception as error:  # whatever it is: nothing may run
        logger.error("SafeCFG: %s=%r: %s. No prompt will run.", VARIABLE, os.environ[VARIABLE], error)
        return Enforcement((), allowed, f"this server is to enforce SafeCFG, but {error}")
    about = "; ".join(f"{hgr.path} ({', '.join(hgr.info.categories)})" for hgr in hgrs)
    logger.warning("SafeCFG: enforced for every prompt with %s; allowed besides: %s", about, ", ".join(sorted(allowed)) or "none")
    return Enforcement(hgrs, allowed)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _path(name: str) -> str:
    """The file of a name in models/hgr, or of a path."""
    register_folder()
    found = folder_paths.get_full_path(FOLDER, name) or (name if os.path.isfile(name) else None)
    if found is None:
        raise hgr_models.HGRError(f"there is no HGR {name!r} in models/hgr, and no such file")
    return found


def register() -> None:
    """Makes the server ask us before it queues a prompt, if the environment says so; called as early as the host allows."""
    server = current_server()
    if server is not None and enforcement() is not None and handle not in server.on_prompt_handlers:
        server.add_on_prompt_handler(handle)


def extra_nodes() -> list[type[io.ComfyNode]]:
    """The nodes that rewritten prompts have; none where nothing is enforced."""
    return [] if enforcement() is None else [Enforced, Refused]


def handle(request):
    """Prompt handler: the request with a prompt in which every MODEL goes through SafeCFG, or with one that cannot run."""
    try:
        server = current_server()
        if server.on_prompt_handlers[-1:] != [handle]:
            server.add_on_prompt_handler(handle)  # another pack's came later: look again after it, in this very round
        return _rewritten(server, request)
    except hgr_models.HGRError as error:
        reason = str(error)
    except Exception as error:
        logger.exception("SafeCFG: a prompt could not be checked.")
        reason = f"this prompt could not be checked ({type(error).__name__}: {error})."
    logger.warning("SafeCFG (enforced): refused a prompt: %s", reason)
    return {"prompt": {"safecfg": {"class_type": REFUSED, "inputs": {"reason": f"SafeCFG (enforced): {reason}"}}}}


def _rewritten(server, request) -> dict:
    import nodes  # ComfyUI's: the list of all nodes

    state = enforcement()
    if state.problem:
        raise hgr_models.HGRError(state.problem)
    if not isinstance(request, dict):
        raise hgr_models.HGRError("expected an object with a prompt.")
    if "prompt" not in request:
        return request  # ComfyUI refuses it
    prompt = request["prompt"]
    check_nodes(prompt, nodes.NODE_CLASS_MAPPINGS, state.allowed)
    if (manager := getattr(server, "node_replace_manager", None)) is not None:
        manager.apply_replacements(prompt)  # ComfyUI does it after the handlers: renamed nodes must be seen here
        check_nodes(prompt, nodes.NODE_CLASS_MAPPINGS, state.allowed)
    return {**request, "prompt": rewrite(prompt, nodes.NODE_CLASS_MAPPINGS)}


class Enforced(io.ComfyNode):
    """Puts SafeCFG into what passes through; see `enforced_model`."""

    @classmethod
    def define_schema(cls):
        return make_schema(
            node_id=GUARD,
            display_name="SafeCFG Enforced",
            description="This server puts it after everything that can hold a MODEL. Whatever passes has SafeCFG in it, with every "
            "category on and strict, whatever the workflow says. It is of no use to place it by hand.",
            is_dev_only=True,
            inputs=[
                make_input(io.AnyType, "value", tooltip="What passes through."),
                make_input(io.Float, "low", optional=True, tooltip="For numbers: the lowest that is let through."),
                make_input(io.Float, "high", optional=True, tooltip="For numbers: the highest that is let through."),
            ],
            outputs=[io.AnyType.Output(display_name="value", tooltip="The same; MODELs with SafeCFG.")],
        )

    @classmethod
    def execute(cls, value, low=None, high=None):
        state = enforcement()
        if state is None or state.problem:
            raise SafeCFGError("SafeCFG (enforced): nothing is enforced on this server.")
        if low is None and high is None:
            return io.NodeOutput(enforced(value, state.hgrs))
        low, high = float("-inf" if low is None else low), float("inf" if high is None else high)
        if not isinstance(value, Real) or not low <= value <= high:
            raise SafeCFGError(f"SafeCFG (enforced): expected a number from {low:g} to {high:g}, but a link gave {value!r}.")
        return io.NodeOutput(value)


class Refused(io.ComfyNode):
    """Stands in for a prompt that must not run: it never validates."""

    @classmethod
    def define_schema(cls):
        return make_schema(
            node_id=REFUSED,
            display_name="SafeCFG Refused",
            description="Stands for a workflow that this server does not run. It never validates; its text says why.",
            is_output_node=True,
            is_dev_only=True,
            inputs=[make_input(io.String, "reason", tooltip="Why the workflow does not run.")],
            outputs=[],
        )

    @classmethod
    def validate_inputs(cls, reason):
        return reason if isinstance(reason, str) and reason else "SafeCFG (enforced): refused."

    @classmethod
    def execute(cls, reason):
        raise SafeCFGError(reason)
