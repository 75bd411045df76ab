"""Progress of long work: a bar with time left, a preview, interruption, and a regular moment to save."""

import logging
import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from PIL import Image

from .plan import in_words

UNITS = 1000  # of the bar
SHOW_EVERY, SAVE_EVERY = 3.0, 30.0  # seconds
PREVIEW_SIZE = 1024

logger = logging.getLogger(__name__)


class Progress:
    """The parts of a training with the seconds that each is expected to take."""

    def __init__(
        self, parts: dict[str, float], draw: Callable[[], Image.Image], save: Callable[[], None], say: Callable[[str], None]
    ):
        self.parts, self.draw, self.save, self.say = dict(parts), draw, save, say
        self.bar = comfy.utils.ProgressBar(UNITS)
        self.done: dict[str, float] = dict.fromkeys(parts, 0.0)
        self.shown = 0.0
        self.saved = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds that are expected to remain."""
        return sum(seconds * (1 - self.done[name]) for name, seconds in self.parts.items())

    def rate(self, part: str, seconds: float) -> None:
        """Replaces the expectation of a part by what was measured."""
        self.parts[part] = seconds

    def update(self, part: str, share: float, message: str) -> None:
        """A part is done by `share` in [0, 1]; raises core's InterruptProcessingException when the user cancels."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done[part] = share
        now = time.monotonic()
        if now - self.saved > SAVE_EVERY:
            self.save()
            self.saved = time.monotonic()
        if now - self.shown > SHOW_EVERY or share >= 1:
            self.shown = now
            total = sum(self.parts.values()) or 1.0
            picture = ("JPEG", self.draw(), PREVIEW_SIZE)
            self.bar.update_absolute(round(UNITS * (1 - self.left / total)), UNITS, picture)
            self.say(f"{message}, about {in_words(self.left)} left" if self.left else message)
