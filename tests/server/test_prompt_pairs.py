"""`SafeCFG Prompt Pairs` on a real server: run alone it shows its summary, reads files again, and its errors are readable."""

import pytest

WIDGETS = {
    "prompt_set": "seven categories", "categories": "sexual, violence", "pairs_per_category": 20, "clean_prompts": 10,
    "own_pairs": "", "own_category": "own", "file": "none", "held_out": 0.1, "seed": 0,
}  # fmt: skip


@pytest.fixture
def summary(server):
    """`summary(**widgets)`: the text that the node shows."""

    def run(**widgets) -> str:
        graph = {"1": {"class_type": "SafeCFG_PromptPairs", "inputs": {**WIDGETS, **widgets}}}
        return server.post_prompt(graph)["outputs"]["1"]["text"][0]

    return run


def test_the_node_runs_alone(summary):
    text = summary()
    assert "\nviolence: " in text and "\nsexual: " in text and "hate" not in text


def test_a_changed_file_is_read_again(server, summary):
    file = server.base / "input" / "mine.csv"
    file.parent.mkdir(exist_ok=True)
    for rows in (1, 2):
        file.write_text("harmful,safe\n" + "".join(f"a {i} cat,a {i} dog\n" for i in range(rows)), encoding="utf-8")
        assert f"own: {rows} pairs, 0 held out" in summary(file="mine.csv", prompt_set="own only", categories="", held_out=0.0)


def test_errors_come_back_readable(summary, prompt_error):
    cases = [
        ({"file": "gone.csv"}, "There is no file 'gone.csv'"),
        ({"file": "../extra_model_paths.yaml"}, "There is no file"),
        ({"prompt_set": "emoji"}, "not in list|There is no prompt set 'emoji'; there is seven categories"),
        ({"categories": "weapons"}, "Unknown category .weapons. in .*: these prompts have hate, harassment"),
        ({"own_pairs": "fine => good\nno arrow"}, "line 2: expected one `=>`, as in `harmful => safe`, but got 'no arrow'"),
        ({"prompt_set": "own only", "categories": ""}, "Expected pairs of your own"),
        ({"pairs_per_category": 0}, "smaller than min"),
        ({"held_out": 0.6}, "bigger than max"),
    ]
    for widgets, message in cases:
        with pytest.raises(prompt_error, match=message):
            summary(**widgets)
