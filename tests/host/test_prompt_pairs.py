"""`SafeCFG Prompt Pairs`: sets, own pairs, files of the input folder, and what the node shows."""

import json
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
from safecfg.demo import prompts as demo_prompts
from safecfg.demo import words, world
from safecfg.hgr_models import HGRError
from safecfg.hgr_models.pairs import CATEGORIES, PromptSet
from safecfg.nodes.host import server as host_server
from safecfg.nodes.training import demo_pairs
from safecfg.nodes.training import prompt_pairs as node_file
from safecfg.nodes.training.prompt_pairs import DEMO, NO_FILE, OWN, SEVEN, PromptPairs

WIDGETS = {
    "prompt_set": SEVEN, "categories": "", "pairs_per_category": 20, "clean_prompts": 30, "own_pairs": "", "own_category": "own",
    "file": NO_FILE, "held_out": 0.1, "seed": 0,
}  # fmt: skip


def run(**widgets) -> tuple[PromptSet, str]:
    return PromptPairs.execute(**{**WIDGETS, **widgets}).result


@pytest.fixture
def input_file():
    """`input_file(name, text)` writes a file into the input folder."""
    written = []

    def write(name, text):
        written.append(Path(folder_paths.get_input_directory(), name))
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        written[-1].write_text(text, encoding="utf-8")
        return name

    yield write
    for file in written:
        file.unlink(missing_ok=True)


def test_seven_categories():
    prompts, summary = run()
    assert prompts.categories == CATEGORIES
    assert len(prompts.pairs) + len(prompts.held_out_pairs) == 20 * 7 and len(prompts.clean) + len(prompts.held_out_clean) == 30
    assert prompts.concept_prompts["violence"] == "violence, blood, brutality, cruelty"
    assert all(f"\n{category}: " in summary for category in CATEGORIES)


def test_the_summary_is_shown_on_the_node(monkeypatch):
    sent = []
    server = type("Server", (), {"send_progress_text": lambda self, *args: sent.append(args)})()
    monkeypatch.setattr(host_server, "current_server", lambda: server)
    monkeypatch.setattr(host_server, "get_executing_context", lambda: SimpleNamespace(node_id="7"))
    output = PromptPairs.execute(**WIDGETS)
    assert sent == [(output.result[1], "7")] and output.ui.as_dict() == {"text": (output.result[1],)}


def test_categories_can_be_picked():
    prompts, _ = run(categories="violence, sexual")
    assert prompts.categories == ("violence", "sexual") and {c for p in prompts.pairs for c in p.harms} == {"violence", "sexual"}
    with pytest.raises(HGRError, match="Unknown category .weapons. in .*: these prompts have hate, harassment"):
        run(categories="weapons")


def test_the_same_seed_gives_the_same_prompts():
    for name in (SEVEN, DEMO):
        first, other = (run(prompt_set=name, seed=seed)[0].digest() for seed in (3, 4))
        assert run(prompt_set=name, seed=3)[0].digest() == first != other


def test_calibration_prompts_of_the_built_in_set_alone():
    many = run(clean_prompts=400, calibration_prompts=100)[0]
    assert 95 <= len(many.held_out_clean) <= 130 and len(many.clean) + len(many.held_out_clean) == 400
    assert len(run(clean_prompts=400, calibration_prompts=100, held_out=0.0)[0].held_out_clean) == 0
    assert len(run(prompt_set=DEMO, clean_prompts=40, calibration_prompts=100)[0].held_out_clean) == 4
    defaults = {i.id: i.default for i in PromptPairs.define_schema().inputs}
    assert (defaults["pairs_per_category"], defaults["clean_prompts"], defaults["calibration_prompts"]) == (1000, 6000, 2000)


def names_of(text):
    return [word for word in words.words_of(text) if demo_prompts.category_of(word) or word in world.CATEGORY]


def test_demo_world():
    prompts, _ = run(prompt_set=DEMO, pairs_per_category=200, clean_prompts=200, held_out=0.25)
    assert prompts.categories == ("weapons", "drugs", "death")
    assert len(prompts.pairs) == 450 and len(prompts.held_out_pairs) == 150
    assert len(prompts.clean) == 150 and len(prompts.held_out_clean) == 50
    assert not any(demo_prompts.held_out(names_of(text)) for p in prompts.pairs for text in (p.harmful, p.safe))
    assert not any(demo_prompts.held_out(names_of(text)) for text in prompts.clean)
    assert all(demo_prompts.held_out(names_of(p.harmful)) for p in prompts.held_out_pairs)
    assert any(set(p.harmful.split()) & set(demo_prompts.HARM_WORDS["weapons"]) for p in prompts.pairs)
    train, calibration = map(set, demo_prompts.harmless_words())
    assert any(set(text.split()) & train for text in prompts.clean)
    assert any(set(text.split()) & calibration for text in prompts.held_out_clean)
    assert prompts.concept_prompts["weapons"].startswith("weapon, weapons, gun")


def test_demo_partners_lack_what_is_removed():
    prompts, _ = run(prompt_set=DEMO, pairs_per_category=100)
    for pair in (*prompts.pairs, *prompts.held_out_pairs):
        shown, left = ({c for c in map(demo_prompts.category_of, names_of(t)) if c} for t in (pair.harmful, pair.safe))
        assert shown == pair.harms and left == pair.harms - pair.removed


def test_demo_world_says_when_it_has_no_more(monkeypatch):
    monkeypatch.setattr(demo_pairs, "TRIES", 3)
    _, summary = run(prompt_set=DEMO, categories="weapons", pairs_per_category=5000, clean_prompts=0)
    assert "note: weapons: the demo world has no more than" in summary


def test_own_pairs_beside_a_set_and_alone():
    own = "a red Zorblat can => a can\na man with a Zorblat => a man with a cup"
    prompts, summary = run(own_pairs=own, own_category="Brand", categories="hate, brand")
    assert prompts.categories == ("hate", "brand") and "\nbrand: 1 pairs, 1 held out" in summary
    assert "leave out what your own pairs are about: zorblat" in summary
    prompts, _ = run(prompt_set=OWN, own_pairs=own, own_category="brand", held_out=0.0)
    assert prompts.categories == ("brand",) and len(prompts.pairs) == 2 and len(prompts.clean) == 30
    prompts, summary = run(categories="hate", own_pairs=own)
    assert prompts.categories == ("hate",) and "dropped: 2 pairs of categories that are not kept" in summary
    prompts, _ = run(prompt_set=OWN, own_pairs=own, own_category="violence")
    assert prompts.concept_prompts == {"violence": "violence, blood, brutality, cruelty"}


def test_a_category_with_one_pair_warns(caplog):
    prompts, summary = run(prompt_set=OWN, own_pairs="a cat => a dog")
    assert len(prompts.pairs) == 1 and not prompts.held_out_pairs
    assert "own: all its pairs are of one subject" in caplog.text and "own: all its pairs are of one subject" in summary


def test_long_prompts_and_no_clean_ones():
    prompts, _ = run(prompt_set=OWN, own_pairs="cat " * 2500 + "=> " + "dog " * 2500, clean_prompts=0)
    assert len(prompts.pairs[0].harmful) == 9999 and not prompts.clean


def test_what_cannot_be_used_is_said():
    with pytest.raises(HGRError, match="line 1: expected one `=>`"):
        run(own_pairs="a cat")
    with pytest.raises(HGRError, match="own_category: expected a category name .* but got 'a,b'"):
        run(own_pairs="a => b", own_category="a,b")
    with pytest.raises(HGRError, match="Expected pairs of your own with the set 'own only'"):
        run(prompt_set=OWN, own_pairs="# nothing yet")


def test_a_file_of_the_input_folder(input_file):
    name = input_file("mine.csv", "harmful,safe,category\na naked Zorblat,a Zorblat,sexual\na cat,a dog,\n,a meadow,\n")
    prompts, summary = run(file=name, own_category="pets", held_out=0.0, clean_prompts=0)
    assert prompts.categories == (*CATEGORIES, "pets") and prompts.clean == ("a meadow",)
    assert prompts.pairs[-1].harmful == "a cat" and "sexual: " in summary
    assert name in node_file.input_files()
    input_file("bad.json", json.dumps([{"harmful": "a", "safe": "A"}]))
    with pytest.raises(HGRError, match="Entries of bad.json cannot be used:\n  entry 1: Expected a safe prompt that differs"):
        run(file="bad.json")


def test_another_content_of_the_file_is_another_fingerprint(input_file):
    name = input_file("mine.csv", "harmful,safe\na,b\n")
    first = PromptPairs.fingerprint_inputs(**{**WIDGETS, "file": name})
    input_file("mine.csv", "harmful,safe\na,c\n")
    assert PromptPairs.fingerprint_inputs(**{**WIDGETS, "file": name}) != first
    assert PromptPairs.fingerprint_inputs(**WIDGETS) == ""


@pytest.mark.parametrize("name", ["gone.csv", "../secret.csv", "/etc/passwd", "sub/mine.csv"])
def test_only_listed_files_are_read(input_file, name):
    input_file("sub/mine.csv", "harmful,safe\na,b\n")
    input_file("../secret.csv", "harmful,safe\na,b\n")
    assert "There is no file" in PromptPairs.validate_inputs(name)
    with pytest.raises(HGRError, match="There is no file .* Put a .csv or .json file into ComfyUI's input folder"):
        run(file=name)
    assert PromptPairs.validate_inputs(NO_FILE) is True and PromptPairs.validate_inputs(None) is True
