"""What the training scripts share: random scenes."""

import random

from .. import world


def random_names(rng: random.Random) -> tuple[str, ...]:
    """One pictogram (35 %) or two different ones, all equally likely."""
    return tuple(rng.sample(world.NAMES, 1 if rng.random() < 0.35 else 2))
