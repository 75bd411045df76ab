"""The real server with the pack in it: what a user sees before any picture is made."""

import pytest
from PIL import Image
from safetensors.numpy import load_file


def test_pack_is_loaded(server):
    assert "IMPORT FAILED" not in server.log()
    ours = [name for name, node in server.object_info().items() if node["python_module"] == "custom_nodes.safecfg"]
    assert "SafeCFG_Apply" in ours
    assert all(name.startswith("SafeCFG_") for name in ours), ours


def test_a_prompt_gives_its_files(server):
    """The fixture itself: a latent and a picture come back as files."""
    prompt = {
        "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 64, "batch_size": 2}},
        "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "fixture"}},
        "3": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 8, "batch_size": 1, "color": 255}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    }
    entry = server.post_prompt(prompt)
    (latent,), (picture,) = server.files(entry, "2"), server.files(entry, "4")
    assert load_file(latent)["latent_tensor"].shape == (2, 4, 8, 16)
    assert Image.open(picture).size == (16, 8)


def test_refused_and_failed_prompts_raise(server, prompt_error):
    with pytest.raises(prompt_error, match="node_errors"):
        server.post_prompt({"1": {"class_type": "PreviewImage", "inputs": {}}})
    replace = {"string": "a", "regex_pattern": "(", "replace": "b"}
    failing = {
        "1": {"class_type": "RegexReplace", "inputs": replace},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    with pytest.raises(prompt_error, match="unterminated subpattern") as caught:
        server.post_prompt(failing)
    assert caught.value.details["node_type"] == "RegexReplace"
