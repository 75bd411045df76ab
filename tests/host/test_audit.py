"""The audit log: what a line says, who may write at once, and what happens when nobody can."""

import json
import os
import sys
import threading
from types import SimpleNamespace

import folder_paths
import pytest
from comfy_execution.utils import CurrentNodeContext
from safecfg.nodes.host.hooks import SafeCFGError
from safecfg.nodes.redirect.apply import Apply
from safecfg.nodes.reporting import audit

from fakes import NEVER, KnownRedirection, apply_hgr, make_hgr, sample


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """The output folder; it does not exist yet."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "output"


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / audit.FILE).read_text(encoding="utf-8").splitlines()]


def test_off_by_default(tiny_model, tiny_cond, output):
    (widget,) = [i for i in Apply.define_schema().inputs if i.id == "audit_log"]
    assert widget.default == "off" and widget.optional
    sample(apply_hgr(tiny_model), tiny_cond(1), tiny_cond(2))
    assert not output.exists()


def test_a_line_per_image(tiny_model, tiny_cond, monkeypatch, output):
    KnownRedirection(monkeypatch, rows={1})
    hgr = make_hgr(condition=NEVER)
    model = apply_hgr(tiny_model, hgr, audit_log="scores", hgr_hash=hgr.hash)
    for seed in (5, 6):
        sample(model, tiny_cond(1), tiny_cond(2), batch=2, seed=seed)
    found = lines(output)
    assert [(line["seed"], line["image"], line["redirected"]) for line in found] == [
        (5, 0, []), (5, 1, ["red", "blue"]), (6, 0, []), (6, 1, ["red", "blue"])
    ]  # fmt: skip
    assert all(line["hgr"] == hgr.hash and line["time"].endswith("+00:00") and "prompt_text" not in line for line in found)
    assert found[1]["scores"] == {"red": 1.0, "blue": 1.0} and found[1]["flagged"] and found[1]["guidance"] == found[1]["scores"]
    assert found[0]["prompt"].keys() == {"red", "blue"}


def test_the_prompt_only_when_asked(tiny_model, tiny_cond, monkeypatch, output):
    graph = {
        "8": {"class_type": "KSampler", "inputs": {"positive": ["4", 0], "negative": ["5", 0]}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "ein Apfel, größer"}},
        "5": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "blurry"}},
    }
    queue = SimpleNamespace(get_current_queue_volatile=lambda: ([(0, "other", {}), (1, "mine", graph)], []))
    instance = SimpleNamespace(prompt_queue=queue, client_id=None, sockets={})
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    model = apply_hgr(tiny_model, audit_log="scores and prompt")
    with CurrentNodeContext("mine", "8"):
        sample(model, tiny_cond(1), tiny_cond(2))
    sample(model, tiny_cond(1), tiny_cond(2))  # nobody knows where
    assert [line["prompt_text"] for line in lines(output)] == [["ein Apfel, größer"], None]
    assert lines(output)[0]["prompt_id"] == "mine"


def node(**inputs):
    return {"class_type": "Any", "inputs": inputs}


def test_texts_are_found_where_the_graph_tells_them():
    graph = {
        "encode": node(clip=["x", 0], text="a"),
        "other": node(clip=["x", 0], text_g="b", text_l="a", width=1024),
        "linked": node(clip=["x", 0], text=["string", 0]),
        "string": node(value="c"),
        "joined": node(clip=["x", 0], text=["join", 0]),
        "join": node(string_a="c", string_b="d"),
        "control": node(positive=["encode", 0], negative=["linked", 0], control_net=["x", 0], image=["x", 0]),
        "combined": node(conditioning_1=["control", 0], conditioning_2=["other", 0]),
        "guider": node(model=["x", 0], cond1=["combined", 0], cond2=["linked", 0], negative=["joined", 0]),
        "loop": node(conditioning=["loop", 0]),
    }
    texts = lambda **inputs: audit.prompt_texts({**graph, "sampler": node(**inputs)}, "sampler")  # noqa: E731
    assert texts(positive=["encode", 0], negative=["other", 0]) == ["a"]
    assert texts(positive=["combined", 0]) == ["b", "a"] or texts(positive=["combined", 0]) == ["a", "b"]
    assert texts(positive=["control", 0]) == ["a"] and texts(positive=["control", 1]) == ["c"]
    assert sorted(texts(guider=["guider", 0])) == ["a", "b", "c"]
    assert texts(positive=["joined", 0]) is None  # made while the graph runs
    assert texts(positive=["gone", 0]) is None and texts(latent_image=["encode", 0]) is None
    assert texts(positive=["loop", 0]) is None
    assert audit.prompt_texts(graph, "gone") is None


def test_threads_and_processes_do_not_mix(output):
    long = "x" * 10_000

    def write(name):
        for i in range(40):
            audit.append([json.dumps({"name": name, "i": i, "text": long})] * 3)

    children = []
    for name in range(3) if hasattr(os, "fork") else ():
        if (child := os.fork()) == 0:
            try:
                write(f"process {name}")
            finally:
                os._exit(0)
        children.append(child)
    threads = [threading.Thread(target=write, args=(f"thread {name}",)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for child in children:
        os.waitpid(child, 0)
    found = lines(output)
    assert len(found) == 120 * (3 + len(children)) and all(line["text"] == long for line in found)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_only_its_owner_reads_it(output):
    audit.append(["{}"])
    assert (output / audit.FILE).stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_written_is_noticed(tiny_model, tiny_cond, monkeypatch, output, caplog):
    (output / audit.FILE).mkdir(parents=True)
    known = KnownRedirection(monkeypatch, rows=())
    sample(apply_hgr(tiny_model, audit_log="scores"), tiny_cond(1), tiny_cond(2))
    messages = [r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage()]
    assert len(messages) == 1 and audit.FILE in messages[0] and "audit_log" in messages[0] and known.count == 6
    with pytest.raises(SafeCFGError, match="cannot be written"):
        sample(apply_hgr(tiny_model, audit_log="scores", strict=True), tiny_cond(1), tiny_cond(2))
    assert known.count == 6  # said before the first step


def test_a_disk_that_fills_up_is_noticed(tiny_model, tiny_cond, monkeypatch):
    monkeypatch.setattr(audit.os, "write", lambda file, data: max(0, len(data) - 1))
    with pytest.raises(SafeCFGError, match="bytes were written"):
        sample(apply_hgr(tiny_model, audit_log="scores", strict=True), tiny_cond(1), tiny_cond(2))
