"""The lots of `benchmarks.text_space_lots`: what is held out is never trained on, and the same seed draws the same lot."""

import random

from benchmarks.text_space_lots import OUT, Lot
from demo import prompts as p
from demo import world
from demo.words import words_of


def test_what_a_lot_holds_out_no_training_pair_shows():
    lots = [Lot.draw(seed) for seed in range(5)]
    assert len({lot.pictograms_out for lot in lots}) == 5 and Lot.draw(3) == lots[3]
    for lot in lots:
        out = {*lot.pictograms_out, *lot.words_out}
        assert len(lot.pictograms_out) == OUT and len(out) > OUT
        kept = [sum(world.CATEGORY[name] == category for name in lot.pictograms) for category in world.CATEGORIES]
        assert min(kept) > 1 and not out & {*lot.pictograms, *(word for words in lot.words.values() for word in words)}
        rng = random.Random(0)
        pairs = [lot.pair(rng) for _ in range(300)]
        seen = {word for pair in pairs for text in (pair.prompt, pair.partner) for word in words_of(text)}
        assert not seen & out
        assert all(pair.harms >= pair.removed for pair in pairs) and any(pair.harms > pair.removed for pair in pairs)
        assert {p.category_of(name) for name in lot.words_out} == set(world.CATEGORIES)
