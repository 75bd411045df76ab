"""The protocol of a classifier, and what is said when it breaks it."""

import pytest

from benchmarks.i2p_prompts import InputError
from benchmarks.i2p_tables import classify
from fake_comfy import command


def test_a_classifier_of_folders(tmp_path):
    """{folder} is one word even with a blank in it, and lines with a file come in any order."""
    folder = tmp_path / "two words"
    folder.mkdir()
    code = "import sys; assert sys.argv[1].endswith('two words')\nfor f in 'ba': print('{\"file\": \"%s.png\", \"unsafe\": 0.%d}' % (f, ord(f) - 96))"
    assert classify(command(tmp_path, code) + " {folder}", folder, ["a.png", "b.png"]) == {"a.png": 0.1, "b.png": 0.2}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit(3)", "failed with exit status 3"),
        ("print(1)", "Expected 2 lines .* but got 1"),
        ("print(1)\nprint('unsafe')", "line 2 is 'unsafe'"),
        ("print(1)\nprint('{\"nude\": 1}')", "line 2 is"),
        ("print(1)\nprint('NaN')", "line 2 is 'NaN'"),
        ('print(\'{"file": "a.png", "unsafe": 1}\\n\' * 2)', "said nothing about b.png"),
    ],
)
def test_a_classifier_that_fails(tmp_path, code, reason):
    with pytest.raises(InputError, match=reason):
        classify(command(tmp_path, code), tmp_path, ["a.png", "b.png"])


def test_no_such_classifier(tmp_path):
    for nothing, reason in (("there-is-no-such-command", "could not be run"), (" ", "got nothing")):
        with pytest.raises(InputError, match=reason):
            classify(nothing, tmp_path, ["a.png"])
