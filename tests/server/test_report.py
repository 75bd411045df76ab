"""SafeCFG Report and the live meter on a real server, with a front end's WebSocket."""

import json
import os
import socket
import struct
import time
import urllib.parse
import urllib.request
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from templates import path_of
from workflow_format import to_prompt

WORKFLOW = path_of("See what was redirected")
APPLY, SAMPLER, REPORT, TEXT = "3", "7", "10", "11"  # ids in the workflow


class Listener:
    """A minimal WebSocket client (RFC 6455): the server's text messages."""

    def __init__(self, url: str, client: str):
        address = urllib.parse.urlparse(url)
        self.socket = socket.create_connection((address.hostname, address.port), timeout=120)
        self.file = self.socket.makefile("rb")
        request = f"GET /ws?clientId={client} HTTP/1.1\r\nHost: {address.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self.socket.sendall(f"{request}Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
        assert b"101" in self.file.readline()
        while self.file.readline().strip():
            pass

    def messages(self):
        while True:
            first, size = struct.unpack("!BB", self.file.read(2))
            if size in (126, 127):
                size = struct.unpack(*(("!H", self.file.read(2)) if size == 126 else ("!Q", self.file.read(8))))[0]
            content = self.file.read(size)
            if first & 15 == 1:  # text
                yield json.loads(content)

    def close(self):
        self.file.close()
        self.socket.close()


def queue(server, prompt: dict, client: str) -> list[dict]:
    """Runs a prompt as a front end does; what the server sent about it until its end."""
    with closing(Listener(server.url, client)) as listener:
        body = json.dumps({"prompt": prompt, "client_id": client}).encode()
        request = urllib.request.Request(server.url + "/prompt", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            number = json.load(answer)["prompt_id"]
        found, deadline = [], time.monotonic() + 300
        for message in listener.messages():
            found.append(message)
            data = message["data"]
            assert message["type"] != "execution_error", data
            if message["type"] == "execution_success" and data["prompt_id"] == number:
                return found
            assert time.monotonic() < deadline
    raise AssertionError("the server closed the connection")


@pytest.fixture
def prompt(server) -> dict:
    return to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.object_info())


def test_every_link_fits(server):
    workflow, info = json.loads(WORKFLOW.read_text(encoding="utf-8")), server.object_info()
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][slot]["link"] == number
        assert info[nodes[source]["type"]]["output"][output] == kind and nodes[target]["inputs"][slot]["type"] in (kind, "*")


def test_report_and_meter(server, prompt):
    messages = queue(server, prompt, "front-end")
    meter = [message["data"] for message in messages if message["type"] == "safecfg.meter"]
    assert all(m["node"] == APPLY and m["sampler"] == SAMPLER and m["images"] == 2 for m in meter if m["series"])
    assert len(meter) >= 2 and not meter[0]["series"] and "weapons" in meter[0]["categories"]
    assert meter[-1]["done"] and len(meter[-1]["series"]) == meter[-1]["steps"] == 25 and meter[-1]["redirected_images"] == 1
    shown = {message["data"]["node"]: message["data"]["output"] for message in messages if message["type"] == "executed"}
    pictures = [server.base / image["type"] / image["subfolder"] / image["filename"] for image in shown[REPORT]["images"]]
    assert len(pictures) == 2 and all(np.asarray(Image.open(picture)).std() > 5 for picture in pictures)
    harmful, clean = json.loads(shown[TEXT]["text"][0])["images"]
    assert harmful["redirected"] == ["weapons"] and clean["redirected"] == [] and harmful["seed"] == 42
    assert len(harmful["steps"]) == len(clean["steps"]) == 25


def test_a_report_added_later_finds_the_trace(server, prompt):
    """The sampler comes from ComfyUI's cache."""
    prompt[SAMPLER]["inputs"] |= {"seed": 77, "steps": 5}
    without = {name: node for name, node in prompt.items() if name not in (REPORT, TEXT)}
    server.post_prompt(without)
    started = time.monotonic()
    messages = queue(server, prompt, "later")
    assert SAMPLER not in [m["data"]["node"] for m in messages if m["type"] == "executing"], time.monotonic() - started
    shown = {m["data"]["node"]: m["data"]["output"] for m in messages if m["type"] == "executed"}
    assert all(image["found"] and image["seed"] == 77 for image in json.loads(shown[TEXT]["text"][0])["images"])


def test_the_audit_log(server, prompt):
    """No front end listens; a line per image, in the output folder."""
    prompt[APPLY]["inputs"]["audit_log"] = "scores and prompt"
    prompt[SAMPLER]["inputs"] |= {"seed": 78, "steps": 3}
    server.post_prompt(prompt)
    file = server.base / "output" / "safecfg_audit.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(line["image"], line["seed"]) for line in lines] == [(0, 78), (1, 78)]
    assert lines[0]["redirected"] == ["weapons"] and lines[1]["redirected"] == []
    assert lines[0]["prompt_text"] == ["a knife and an apple\na frog and a strawberry"]
    assert os.name != "posix" or file.stat().st_mode & 0o077 == 0


def test_old_prompts_need_no_audit_log(server, prompt):
    del prompt[APPLY]["inputs"]["audit_log"]
    prompt[SAMPLER]["inputs"] |= {"seed": 79, "steps": 2}
    server.post_prompt(prompt)


def test_a_model_without_safecfg_says_so(server, prompt):
    prompt[REPORT]["inputs"]["model"] = ["1", 0]
    entry = server.post_prompt(prompt)
    assert "this MODEL has no SafeCFG" in json.dumps(entry["outputs"][TEXT])


def test_the_extension_and_the_help_pages_are_served(server):
    scripts = sorted(path for path in server.get("/extensions") if "/safecfg/" in path)
    assert scripts == [f"/extensions/safecfg/js/{name}.js" for name in ("advanced", "meter", "texts")]
    for path in (*scripts, "/extensions/safecfg/docs/SafeCFG_Report.md", "/extensions/safecfg/docs/SafeCFG_Apply.md"):
        with urllib.request.urlopen(server.url + path, timeout=60) as answer:
            assert len(answer.read()) > 500
