"""The pictures of templates and of nodes are of those as they are."""

import pytest
from PIL import Image

from help_pictures import IMAGES, noted, shown
from templates import TEMPLATES, path_of, read
from thumbnails import digest

LEFT = "{} has changed since its picture was made: .venv/bin/python tests/thumbnails.py --only {!r}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_picture_is_stale(name):
    picture = Image.open(path_of(name).with_suffix(".jpg"))
    assert picture.info.get("comment", b"").decode() == digest(read(name)), LEFT.format(name, name)


def test_where_nodes_lie_does_not_matter_and_what_they_draw_does():
    workflow = read("Quickstart")
    before = digest(workflow)
    workflow["nodes"][0]["pos"], workflow["groups"] = [7, 7], []
    assert digest(workflow) == before
    next(node for node in workflow["nodes"] if node["type"] == "CLIPTextEncode")["widgets_values"] = ["a frog"]
    assert digest(workflow) != before


def test_every_help_picture_shows_the_node_as_it_is():
    """`.venv/bin/python tests/pictures.py --only NODE` takes one anew."""
    pictures = {path.stem for path in IMAGES.glob("*.jpg")}
    assert pictures == noted().keys()
    assert not [kind for kind in sorted(pictures) if noted()[kind] != shown(kind)]
