"""One function alone sends texts to the front end, so that what it does to them is done to all."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_texts_reach_the_front_end_in_one_place():
    users = [path for path in ROOT.glob("nodes/**/*.py") if "send_progress_text(" in path.read_text(encoding="utf-8")]
    assert users == [ROOT / "nodes" / "host" / "server.py"]


def test_a_text_that_is_a_result_is_shown_on_its_node():
    """No front end shows a PreviewText by itself: `show_result` does."""
    users = [path for path in ROOT.glob("nodes/**/*.py") if "PreviewText(" in path.read_text(encoding="utf-8")]
    assert users == [ROOT / "nodes" / "host" / "server.py"]


def test_scripts_write_no_html():
    for path in (ROOT / "web" / "js").glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not [name for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write") if name in text], path
