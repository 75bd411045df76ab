"""Server-wide enforcement: with SAFECFG_ENFORCE=<HGR file>, no prompt that is queued samples without SafeCFG.

ComfyUI swallows exceptions of prompt handlers and goes on with the prompt as it was. So whatever goes wrong here turns into another
prompt, of one node that never validates: ComfyUI then answers 400 with the reason, and nothing runs.
"""

import logging
from numbers import Real
from typing import Any

from comfy.sd import CLIP
from comfy_api.latest import io

from ... import hgr_models
from ..host.hooks import SafeCFGError
from ..host.schema import make_input, make_schema
from ..host.server import current_server
from .answers import Refused400, answer_refusals, refused
from .client_files import leave_out_client_folders
from .enforced_graph import Refusal, check_nodes, rewrite
from .enforced_model import enforced
from .judge import EnforcedLatent, EnforcedPicture
from .names import GUARD, REFUSED
from .settings import enforcement, note

logger = logging.getLogger(__name__)


def register() -> None:
    """Makes the server ask us before it queues a prompt, if the environment says so; called as early as the host allows."""
    server = current_server()
    if server is not None and enforcement() is not None and handle not in server.on_prompt_handlers:
        server.add_on_prompt_handler(handle)
        answer_refusals(server)
        leave_out_client_folders(enforcement().allowed)


def extra_nodes() -> list[type[io.ComfyNode]]:
    """The nodes that rewritten prompts have; none where nothing is enforced."""
    return [] if enforcement() is None else [Enforced, Refused, EnforcedLatent, EnforcedPicture]


def handle(request: dict) -> dict:
    """Prompt handler: the request with a prompt in which every MODEL goes through SafeCFG, or with one that cannot run."""
    try:
        server = current_server()
        if server.on_prompt_handlers[-1:] != [handle]:
            server.add_on_prompt_handler(handle)  # another pack's came later: look again after it, in this very round
        return _rewritten(server, request)
    except hgr_models.HGRError as error:
        found = Refused400(getattr(error, "code", "refused"), str(error))
    except Exception as error:
        logger.exception("SafeCFG: a prompt could not be checked.")
        found = Refused400("unchecked", f"this prompt could not be checked ({type(error).__name__}).")
    logger.warning("SafeCFG (enforced): refused a prompt: %s [safecfg:%s]", found.reason, found.code)
    note("refused", code=found.code, reason=found.reason)
    refused.set(found)
    return {"prompt": {"safecfg": {"class_type": REFUSED, "inputs": {"reason": f"SafeCFG (enforced): {found.reason}"}}}}


def _rewritten(server: Any, request: dict) -> dict:
    import nodes  # ComfyUI's: the list of all nodes

    state = enforcement()
    if state.problem:
        raise Refusal(state.problem, "not-ready")
    if not isinstance(request, dict):
        raise Refusal("expected an object with a prompt.", "no-prompt")
    leave_out_client_folders(state.allowed)  # a pack that came later may have listed them again
    if "prompt" not in request:
        return request  # ComfyUI refuses it
    prompt = request["prompt"]
    check_nodes(prompt, nodes.NODE_CLASS_MAPPINGS, state.allowed)
    if (manager := getattr(server, "node_replace_manager", None)) is not None:
        manager.apply_replacements(prompt)  # ComfyUI does it after the handlers: renamed nodes must be seen here
        check_nodes(prompt, nodes.NODE_CLASS_MAPPINGS, state.allowed)
    return {**request, "prompt": rewrite(prompt, nodes.NODE_CLASS_MAPPINGS, state.judge, state.by_clip)}


class Enforced(io.ComfyNode):
    """Puts SafeCFG into what passes through; see `enforced_model`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
                make_input(io.AnyType, "clip", optional=True, tooltip="For MODELs: the CLIP by which the HGR is chosen."),
            ],
            outputs=[io.AnyType.Output(display_name="value", tooltip="The same; MODELs with SafeCFG.")],
        )

    @classmethod
    def execute(
        cls, value: object, low: object | None = None, high: object | None = None, clip: CLIP | None = None
    ) -> io.NodeOutput:
        state = enforcement()
        if state is None or state.problem:
            raise SafeCFGError("SafeCFG (enforced): nothing is enforced on this server.")
        if low is None and high is None:
            return io.NodeOutput(enforced(value, state.hgrs, state.terms, clip))
        low, high = float("-inf" if low is None else low), float("inf" if high is None else high)
        if not isinstance(value, Real) or not low <= value <= high:
            raise SafeCFGError(
                f"SafeCFG (enforced): expected a number from {low:g} to {high:g}, but a link gave {str(value)[:80]}. [safecfg:limits]"
            )
        return io.NodeOutput(value)


class Refused(io.ComfyNode):
    """Stands in for a prompt that must not run: it never validates."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
    def validate_inputs(cls, reason: str | None) -> str | bool:
        return reason if isinstance(reason, str) and reason else "SafeCFG (enforced): refused."

    @classmethod
    def execute(cls, reason: str | None) -> io.NodeOutput:
        raise SafeCFGError(reason)
