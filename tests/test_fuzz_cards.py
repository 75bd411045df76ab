"""Hostile indexes of known HGRs and hostile model cards: our own errors, and nothing that is shown begins a tag or a line of its own."""

import json

from fuzzing import CASES, as_json, damaged, fuzz, mutated
from helpers import small_hgr
from hgr_models import save_hgr
from hgr_models.checkpoint import read_info
from hgr_models.encoders import EncoderPrint
from hgr_models.hgr_index import KnownHGR, fitting, read_index
from hgr_models.model_card import card_path, measured_of, short_card, write_card

ENCODER = EncoderPrint(("l",), 16, 0, 0, (1.0, -2.0, 3.0))
KNOWN = KnownHGR(
    "a.safetensors", "0" * 64, "https://example.org/a", ("SDXL",), ("base",), ENCODER, ("drugs",), ("condition",), "mit"
)
ROW = {"list": "i2p", "category": "all", "judge": "q16", "arm": "SafeCFG", "n": 9, "share": 0.5, "low": 0.1, "high": 0.9}
MEASURED = {
    "evaluation": {
        "rows": [ROW, ROW], "clean": [{"list": "coco", "arm": "SafeCFG", "n": 3, "bit_identical": 1.0}], "seconds": {"plain": 1.5},
        "protocol": {"name": "casg"}, "judges": [{"name": "q16"}],
    },
    "check": {"model": "SDXL", "harmful_runs": 3, "removal_condition": 0.9, "false_positives": None},
}  # fmt: skip


def test_indexes(tmp_path):
    path, good = tmp_path / "index.json", {"safecfg_index": 1, "hgrs": [KNOWN.as_dict(), KNOWN.as_dict()]}

    def make(rng):
        text = as_json(mutated(rng, json.loads(json.dumps(good)), rng.choice((0.02, 0.08, 0.3)))).encode("utf-8", "surrogatepass")
        path.write_bytes(damaged(rng, text, len(text)) if rng.random() < 0.2 else text)

        def use():
            for entry in fitting(read_index(path), "SDXL", "base", ENCODER):
                assert entry.in_words().isprintable()

        return use

    assert 0 < fuzz("indexes", make) < CASES["indexes"]


def test_cards(tmp_path):
    hgr = tmp_path / "mine.safetensors"
    save_hgr(hgr, small_hgr())
    card, info = write_card(hgr, **MEASURED), read_info(hgr)
    good = card.read_bytes()

    def make(rng):
        if rng.random() < 0.5:
            card_path(hgr).write_bytes(damaged(rng, good, len(good)))
            given = {}
        else:
            card_path(hgr).write_bytes(good)
            given = mutated(rng, json.loads(json.dumps(MEASURED)), rng.choice((0.02, 0.08, 0.3)))
            given = (
                {name: value for name, value in given.items() if name in MEASURED and isinstance(value, dict)}
                if isinstance(given, dict)
                else {}
            )

        def use():
            shown = short_card(*info, measured_of(hgr))
            assert "<" not in shown and shown.count("\n") == 3
            write_card(hgr, **given)
            short_card(*info, measured_of(hgr))

        return use

    assert 0 < fuzz("cards", make) < CASES["cards"]
