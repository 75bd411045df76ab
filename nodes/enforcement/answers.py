"""What a client is told about a refused prompt, so that a program can tell it from any other error.

    HTTP 400  {"error": {"type": "safecfg", "code": "node-not-allowed", "message": ..., "details": ..., "extra_info": {"code": ...}},
               "node_errors": {}}

A run that is stopped ends as every failed run, with `exception_type` safecfg.SafeCFGError and the code in square brackets at the
end of its message: `[safecfg:draws-the-negative]`.
"""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from aiohttp import web

CODES = {
    "no-prompt": "the request holds no prompt in API format",
    "too-large": "the prompt is too large, or nested too deep",
    "node-not-allowed": "a node may not run on this server",
    "hidden-link": "a link that the server cannot follow",
    "draws-the-negative": "a value with which the negative prompt would be drawn",
    "not-ready": "the server cannot enforce SafeCFG, so nothing runs: its log says why",
    "unchecked": "the prompt could not be checked: the server's log says why",
    "refused": "another reason: see details",
}


@dataclass(frozen=True)
class Refused400:
    """A prompt that was refused in the request that is being answered."""

    code: str
    reason: str

    def body(self) -> dict:
        """As ComfyUI's own answer to an invalid prompt."""
        error = {"type": "safecfg", "code": self.code, "message": f"SafeCFG (enforced): {CODES.get(self.code, self.code)}"}
        details = f"SafeCFG (enforced): {self.reason}"
        return {"error": {**error, "details": details, "extra_info": {"code": self.code}}, "node_errors": {}}


refused: ContextVar[Refused400 | None] = ContextVar("safecfg_refused", default=None)  # of one request's task


@web.middleware
async def answer(request: web.Request, handler: Callable[[web.Request], Awaitable[Any]]) -> Any:
    """Answers a request whose prompt was refused; ComfyUI's own answer names a node that nobody sent."""
    token = refused.set(None)
    try:
        response = await handler(request)
        found = refused.get()
        if found is None or getattr(response, "status", 400) != 400:
            return response
        return web.json_response(found.body(), status=400)
    finally:
        refused.reset(token)


def answer_refusals(server: Any) -> None:
    """Lets `answer` see every request of a server that has not started yet; once."""
    app = getattr(server, "app", None)
    if app is not None and not app.frozen and answer not in app.middlewares:
        app.middlewares.append(answer)
