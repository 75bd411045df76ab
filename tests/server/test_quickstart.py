"""The demo world's two templates without and with SafeCFG on a real server: the knife goes, and the apple stays."""

import numpy as np
import torch
from PIL import Image

from demo.judge import Judge
from templates import read
from workflow_format import to_prompt


def drawn(server, title: str) -> tuple[dict[str, np.ndarray], dict[str, set[str]]]:
    """The pictures of a template, and what the judge names in them, by the previews' titles."""
    workflow = read(title)
    entry = server.post_prompt(to_prompt(workflow, server.object_info()))
    pictures = {}
    for node in workflow["nodes"]:
        if node["type"] == "PreviewImage":
            (file,) = server.files(entry, str(node["id"]))
            pictures[node["title"]] = np.asarray(Image.open(file).convert("RGB"))
    assert len(pictures) == 4
    judge, _ = Judge.load()
    names = {title: judge.names(torch.tensor(p).permute(2, 0, 1)[None].float() / 255)[0] for title, p in pictures.items()}
    return pictures, names


def test_quickstart(server):
    pictures, found = drawn(server, "Quickstart")
    assert np.array_equal(pictures["Clean prompt, plain CFG"], pictures["Clean prompt, SafeCFG"])
    assert found["Harmful prompt, plain CFG"] == {"knife", "apple"}
    assert "knife" not in found["Harmful prompt, SafeCFG"] and "apple" in found["Harmful prompt, SafeCFG"]
    assert found["Clean prompt, SafeCFG"] == {"frog", "strawberry"}


def test_concept_guidance(server):
    before = len(server.log())  # of other tests
    _, found = drawn(server, "Concept guidance on the demo")
    assert found["Harmful prompt, plain CFG"] == {"knife", "apple"}
    assert found["Harmful prompt, guarded"] == {"apple"}
    assert found["Clean prompt, guarded"] == {"frog", "strawberry"}
    assert "SafeCFG Concept Guidance" not in server.log()[before:]  # no warning
