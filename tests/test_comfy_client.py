"""The client of a running ComfyUI: it hears what nodes show, waits for a slow server, and tells it from none."""

import socket
import struct
import threading

import pytest

from hgr_models import comfy_client
from hgr_models.comfy_client import Client, ComfyError, NoAnswer, NoServer
from hgr_models.comfy_events import listen


def test_texts_that_nodes_show_are_heard():
    """A server of the test's own that speaks as ComfyUI does: a status, a long text on a node, a preview; then it goes away."""
    text = "3 of 8 pictures, about 2 min left" + " " * 200
    with socket.create_server(("127.0.0.1", 0)) as server:
        heard, done = [], threading.Event()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        threading.Thread(
            target=serve, args=(server, frame(1, b"{}") + frame(2, node_body("12", text)) + frame(2, b"\0\0\0\1png")), daemon=True
        ).start()
        end = listen(url, "me", lambda words: (heard.append(words), done.set()))
        assert done.wait(30) and heard == [text]
        end()
    assert listen("http://127.0.0.1:9", "me", heard.append)() is None  # nobody there


def node_body(node: str, text: str) -> bytes:
    return struct.pack("!II", 3, len(node)) + node.encode() + text.encode()


def frame(kind: int, body: bytes) -> bytes:
    size = struct.pack("!BB", 128 | kind, len(body)) if len(body) < 126 else struct.pack("!BBH", 128 | kind, 126, len(body))
    return size + body


def serve(server: socket.socket, frames: bytes) -> None:
    stream, _ = server.accept()
    with stream:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += stream.recv(1)
        assert b"GET /ws?clientId=me " in head
        stream.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + frames)


class Answers(Client):
    """A server that gives these answers, one after the other; None: none in time; "gone": it went away."""

    def __init__(self, *answers):
        super().__init__("http://server")
        self.answers = list(answers)

    def _get(self, path):
        if (answer := self.answers.pop(0)) is None:
            raise NoAnswer("timed out")
        if answer == "gone":
            raise NoServer("refused")
        return answer


def test_a_server_that_is_slow_to_answer_is_waited_for(monkeypatch):
    monkeypatch.setattr(comfy_client, "POLL_SECONDS", 0)
    runs, done = {"queue_running": [[0, "7"]], "queue_pending": []}, {"7": {"status": "success"}}
    assert Answers(runs, {}, *[None] * comfy_client.PATIENCE, runs, {}, runs, None, runs, done)._wait("7") == {
        "status": "success"
    }
    with pytest.raises(NoAnswer):
        Answers(runs, {}, *[None] * (comfy_client.PATIENCE + 1))._wait("7")
    with pytest.raises(NoServer, match="went away during the run.*What it wrote is kept"):
        Answers(runs, {}, "gone")._wait("7")
    with pytest.raises(ComfyError, match="has lost a run"):
        Answers({"queue_running": [], "queue_pending": []}, {})._wait("7")


def test_no_answer_in_time_is_told_from_no_server(monkeypatch):
    def late(*_, **__):
        raise TimeoutError("timed out")

    with pytest.raises(NoServer, match="No ComfyUI answers"):
        Client("http://127.0.0.1:9")._read("/queue")
    monkeypatch.setattr(comfy_client.urllib.request, "urlopen", late)
    with pytest.raises(NoAnswer, match="timed out"):
        Client("http://server")._read("/queue")
