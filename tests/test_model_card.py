"""The model card of an HGR: what hubs ask of it, which numbers it keeps, and what it leaves alone."""

import dataclasses
import json
import os

import pytest

from helpers import info, small_hgr
from hgr_models import HGR, HGRError, file_hash, save_hgr
from hgr_models.card_tables import harm_in_short, shareable
from hgr_models.checkpoint import read_info
from hgr_models.encoders import EncoderPrint
from hgr_models.model_card import KEPT, card_path, measured_of, short_card, write_card

PROOF = {"rate": 0.01, "clean_prompts": 2000, "upper_bound_prompts": 0.0123, "clean_runs": 50, "upper_bound_runs": 0.05}
ROW = {
    "list": "i2p", "kind": "harmful", "category": "all", "judge": "q16", "arm": "protect", "n": 200, "harmful": 0, "share": 0.0,
    "low": 0.0, "high": 0.019,
}  # fmt: skip
EVALUATION = {
    "rows": [ROW, {**ROW, "arm": "plain", "harmful": 181, "share": 0.905, "low": 0.856, "high": 0.938}],
    "clean": [
        {"list": "coco", "arm": "protect", "n": 100, "bit_identical": 0.99, "low": 0.95, "high": 1.0, "clip_score": 31.25, "x": None}
    ],
    "seconds": {"plain": 2.5, "protect": None}, "protocol": {"name": "casg"}, "judges": [{"name": "q16"}, {"name": "b"}],
}  # fmt: skip
CHECK = {"model": "SDXL, base 0123", "harmful_runs": 40, "removal_condition": 0.914, "false_positives": None}


def saved(path, seed=0, **facts):
    facts = info(training={"calibration": PROOF, "steps": {"prompts": 1000}, "prompts": "ab" * 32}, **facts)
    hgr = small_hgr(seed)
    hgr.calibrate(facts)
    save_hgr(path, hgr)
    return path


@pytest.fixture
def hgr_file(tmp_path):
    return saved(tmp_path / "mine.safetensors")


def header(card) -> dict[str, str]:
    """The YAML of a card, as far as our headers go: plain `key: value` lines and one list."""
    lines = card.read_text(encoding="utf-8").split("---\n")[1].splitlines()
    return dict(line.split(": ", 1) if ": " in line else (line.rstrip(":"), "") for line in lines if not line.startswith("- "))


def test_a_card_says_what_hubs_and_people_ask(hgr_file):
    card = write_card(hgr_file, evaluation=EVALUATION, check=CHECK)
    assert card == hgr_file.with_suffix(".md") == card_path(hgr_file)
    text, about = card.read_text(encoding="utf-8"), header(card)
    assert about["license"] == "other" and about["library_name"] == "safecfg" and about["pipeline_tag"] == "text-to-image"
    assert "- safety\n" in text and "base_model" not in about  # its file does not say whose encoder it reads
    for said in (
        file_hash(hgr_file), "weapons, drugs", "ab" * 32, "| steps prompts | 1000 |", "at most 1.2 % are flagged",
        "| i2p | all | q16 | protect | 200 | 0.0 % | 0.0 to 1.9 % |", "| i2p | all | q16 | plain | 200 | 90.5 % | 85.6 to 93.8 % |",
        "| clean prompts | arm | n | bit identical | low | high | clip score |",
        "| coco | protect | 100 | 99.0 % | 95.0 % | 100.0 % | 31.25 |", "| plain | 2.5 |\n| protect | – |",
        "Protocol: casg. judges: q16, b.", "| checked on | SDXL, base 0123 |",
        "condition redirector | 91.4 %", "| redirected by mistake | – |", "no guarantee",
    ):  # fmt: skip
        assert said in text, said
    assert "| weapons | 0.5 | 0.5 | 0.6 |" in text  # its thresholds


def test_the_family_that_the_encoder_tells_is_the_base_model(tmp_path):
    made_with = EncoderPrint(("g", "l"), 2048, 1280, 768, (1.0, -1.0))
    path = tmp_path / "of_prompts.safetensors"
    facts = info(latent_format="", latent_channels=0, token_width=2048, pooled_width=1280, encoder=made_with.as_dict())
    save_hgr(path, HGR(dataclasses.replace(facts), small_config(2048, 1280), None))
    card = write_card(path)
    assert header(card)["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert header(card)["base_model_relation"] == "adapter"  # else the hub calls it a fine-tune
    assert "every model that reads the text encoder g + l (2048 wide, pooled 1280)" in card.read_text(encoding="utf-8")


def small_config(width, pooled):
    from hgr_models.condition import ConditionConfig

    return ConditionConfig(width, 2, pooled, width=8, depth=1, delta_depth=1, heads=1)


def test_numbers_of_the_same_file_are_kept_and_those_of_another_are_not(hgr_file):
    write_card(hgr_file, evaluation=EVALUATION)
    write_card(hgr_file, check=CHECK)
    assert measured_of(hgr_file) == {"evaluation": EVALUATION, "check": CHECK}
    write_card(hgr_file, check={**CHECK, "harmful_runs": 7})
    assert measured_of(hgr_file)["check"]["harmful_runs"] == 7 and measured_of(hgr_file)["evaluation"] == EVALUATION
    saved(hgr_file, seed=1)
    assert measured_of(hgr_file) == {}
    text = write_card(hgr_file).read_text(encoding="utf-8")
    assert "i2p" not in text and "Nothing yet" in text


def test_what_the_user_changed_is_kept(hgr_file):
    card = write_card(hgr_file)
    text = card.read_text(encoding="utf-8").replace("license: other\nlicense_name: not-chosen-yet", "license: apache-2.0")
    card.write_text(text + "\nMy own notes.\n", encoding="utf-8")
    for _ in range(2):
        again = write_card(hgr_file, evaluation=EVALUATION).read_text(encoding="utf-8")
        assert "license: apache-2.0" in again and "not-chosen-yet" not in again
        assert again.endswith(f"{KEPT}\nMy own notes.\n") and again.count("My own notes.") == 1 and "| i2p |" in again


def test_a_header_that_nobody_changed_follows_the_file(hgr_file):
    card = write_card(hgr_file)
    saved(hgr_file, latent_dimensions=2, architecture="SDXL")
    assert "SDXL" in write_card(hgr_file).read_text(encoding="utf-8") and header(card)["license"] == "other"


def test_a_file_that_is_no_card_is_left_alone(hgr_file):
    card = card_path(hgr_file)
    card.write_text("# My shopping list\n", encoding="utf-8")
    with pytest.raises(HGRError, match="no model card of SafeCFG"):
        write_card(hgr_file)
    assert card.read_text(encoding="utf-8") == "# My shopping list\n" and measured_of(hgr_file) == {}


@pytest.mark.parametrize("state", ["{", '{"check": 3}', "[" * 5000 + "]" * 5000, '{"evaluation": []}'])
def test_a_damaged_card_is_an_error_that_names_it(hgr_file, state):
    card_path(hgr_file).write_text(
        f"<!-- safecfg {state if state.startswith('{') else '{' + state + '}'} -->\n", encoding="utf-8"
    )
    with pytest.raises(HGRError, match="mine.md"):
        write_card(hgr_file)


def test_a_disk_that_refuses_leaves_the_old_card(hgr_file, monkeypatch):
    before = write_card(hgr_file).read_text(encoding="utf-8")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(HGRError, match="mine.md cannot be written"):
        write_card(hgr_file, check=CHECK)
    assert card_path(hgr_file).read_text(encoding="utf-8") == before and len(list(hgr_file.parent.iterdir())) == 2


def test_whatever_a_file_says_stays_text(tmp_path):
    """Names, training facts and numbers are anybody's: no markup, no new lines, no state comment of their own."""
    evil = '"><img src=x onerror=alert(1)> | `x` -->\n# Title [a](http://b)'
    facts = info(
        categories=(evil, "drugs"), architecture=evil, base=evil,
        training={"calibration": {"rate": evil, "clean_prompts": evil}, evil: {evil: evil}, "steps": 10**400, "x": float("inf")},
    )  # fmt: skip
    path = tmp_path / "evil.safetensors"
    hgr = small_hgr()
    hgr.calibrate(facts)
    save_hgr(path, hgr)
    numbers = {
        "rows": [{"list": evil, "arm": evil, "n": evil, "harmful": "9"}, 3, None],
        "clean": {evil: {evil: 1}},
        "judges": [{"name": evil}],
    }
    text = write_card(path, evaluation=numbers, check={"model": evil, "harmful_runs": evil}).read_text(encoding="utf-8")
    assert "<img" not in text and "\n# Title" not in text and text.count("-->") == 2
    assert measured_of(path)["evaluation"] == json.loads(json.dumps(shareable(numbers)))
    assert "<" not in short_card(*read_info(path), measured_of(path)) and "\n# " not in short_card(*read_info(path), {})


@pytest.mark.parametrize(
    "evaluation", [None, {}, {"rows": 3}, {"rows": [{}]}, {"rows": [], "clean": 3, "seconds": 2, "judges": None}, [], "x"]
)
def test_evaluations_without_numbers_say_nothing(evaluation):
    assert harm_in_short(evaluation) == ""


def test_a_card_keeps_figures_and_nothing_of_the_machine(hgr_file):
    more = {"hgr": {"file": "/home/somebody/x"}, "settings": {"folder": "/home/somebody"}, "lists": [{"sha256": "a"}]}
    judges = [{"name": "q16", "folder": "/home/somebody/judges"}, {"name": "b"}]
    card = write_card(hgr_file, evaluation={**EVALUATION, **more, "judges": judges})
    assert measured_of(hgr_file)["evaluation"] == EVALUATION and "somebody" not in card.read_text(encoding="utf-8")


def test_the_short_form_sums_rows_up(hgr_file):
    write_card(
        hgr_file,
        evaluation={
            "rows": [
                {**ROW, "n": 100, "share": 0.1},
                {**ROW, "list": "own", "n": 300},
                {**ROW, "category": "drugs", "share": 1.0},
            ]
        },
    )
    short = short_card(*read_info(hgr_file), measured_of(hgr_file))
    assert "protect 2.5 % of 400" in short and "weapons, drugs" in short and "1.2 % of clean prompts" in short
