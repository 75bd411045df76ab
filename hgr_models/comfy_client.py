"""A running ComfyUI through its HTTP API: which nodes and files it has, and what graphs give. Standard library only."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

ANSWER_SECONDS = 60  # of one request; a picture may take as long as it wants
POLL_SECONDS = 0.3
PATIENCE = (
    10  # requests in a row that may go without an answer while a run goes on: a server that loads a model is slow to answer
)


class ComfyError(RuntimeError):
    """A server that does not answer, lacks something, refuses a graph or fails in it; the message says what to do."""


class NoAnswer(ComfyError):
    """A server that does not answer in time."""


class NoServer(ComfyError):
    """Nothing answers at an address, or no longer."""


class Client:
    """A ComfyUI server at `url`, such as http://127.0.0.1:8188."""

    def __init__(self, url: str):
        self.url, self.name = url.rstrip("/"), uuid.uuid4().hex

    def inputs(self, node: str) -> dict:
        """The inputs of a node: name -> (type or choices, facts...). Raises ComfyError when the server has no such node."""
        info = self._get(f"/object_info/{urllib.parse.quote(node)}")
        if node not in info:
            raise ComfyError(f"The server at {self.url} has no node {node}. Install what brings it there, and start it again.")
        return {**info[node]["input"].get("required", {}), **info[node]["input"].get("optional", {})}

    def has(self, node: str) -> bool:
        """Whether the server has a node."""
        return node in self._get(f"/object_info/{urllib.parse.quote(node)}")

    def check_choice(self, node: str, name: str, value: str) -> None:
        """Raises ComfyError, with what there is, when `value` is no choice of a node's input."""
        kind, *facts = self.inputs(node)[name]
        choices = kind if isinstance(kind, list) else facts[0].get("options", [])
        if value not in choices:
            raise ComfyError(f"Expected {name} to be one of {', '.join(choices) or 'none'} at {self.url}, but got {value!r}.")

    def run(self, graph: dict) -> dict:
        """Runs a graph (API format); what its output nodes show, by node id.

        Raises ComfyError when the server refuses the graph, fails in it or loses it. An interruption here (Ctrl-C) also stops the
        server's run.
        """
        number = self._queue(graph)
        try:
            entry = self._wait(number)
        except KeyboardInterrupt:
            self.stop(number)
            raise
        if entry["status"]["status_str"] != "success":
            events = {name: event for name, event in entry["status"]["messages"]}
            failure = events.get("execution_error", {})
            reason = f"{failure['node_type']}: {failure['exception_message']}" if failure else "the run was interrupted"
            raise ComfyError(f"The server at {self.url} failed: {reason.strip()}")
        return entry["outputs"]

    def stop(self, number: str) -> None:
        """Takes a run from the queue, or interrupts it where it is the one that runs."""
        running = [item for item in self._get("/queue")["queue_running"] if number in item[:2]]
        self._read(*(("/interrupt", b"{}") if running else ("/queue", json.dumps({"delete": [number]}).encode())))

    def _queue(self, graph: dict) -> str:
        return json.loads(self._read("/prompt", json.dumps({"prompt": graph, "client_id": self.name}).encode()))["prompt_id"]

    def _wait(self, number: str) -> dict:
        silent = 0
        while True:
            try:
                queue = self._get("/queue")  # before the history: what leaves the one is in the other
                if entry := self._get(f"/history/{number}").get(number):
                    return entry
                silent = 0
            except NoAnswer:
                if (silent := silent + 1) > PATIENCE:
                    raise
                continue
            except NoServer:
                raise NoServer(
                    f"The server at {self.url} went away during the run; its log says why, or its memory ran out. What it wrote is kept: start it "
                    "again, then this command."
                ) from None
            if not any(number in item[:2] for items in queue.values() for item in items):
                raise ComfyError(f"The server at {self.url} has lost a run: was it started again? Start this command again, too.")
            time.sleep(POLL_SECONDS)

    def _get(self, path: str) -> dict:
        try:
            return json.loads(self._read(path))
        except ValueError:
            raise ComfyError(f"What answers at {self.url} is no ComfyUI. Name another one with --server.") from None

    def _read(self, path: str, body: bytes | None = None) -> bytes:
        try:
            request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"} if body else {})
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise self._says(error) from None
        except (OSError, ValueError) as error:  # ValueError: no URL
            reason = getattr(error, "reason", error)
            kind = NoAnswer if isinstance(error, TimeoutError) or isinstance(reason, TimeoutError) else NoServer
            raise kind(f"No ComfyUI answers at {self.url} ({reason}). Start it, or name another one with --server.") from None

    def _says(self, error: urllib.error.HTTPError) -> ComfyError:
        """What a refusal tells: the prompt's own error, and those of its nodes."""
        text = error.read().decode("utf-8", errors="replace")
        try:
            about = json.loads(text)
            found = [about["error"]["message"], about["error"].get("details", "")]
            for node in about.get("node_errors", {}).values():
                found += [f"{node['class_type']}: {one['message']} ({one['details']})" for one in node["errors"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            found = [f"HTTP {error.code}", text[:500]]
        return ComfyError(f"The server at {self.url} refused: {'; '.join(filter(None, found))}")
