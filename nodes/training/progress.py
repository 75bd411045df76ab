"""Progress of long work: a bar with time left, a preview, interruption, and a regular moment to save."""

import logging
import time
from collections.abc import Callable

import comfy.model_management
import comfy.utils
from PIL import Image

from .plan import in_words

UNITS = 1000  # of the bar
NAMES = {  # of the parts, for users
    "encoding": "encoding prompts", "prompts": "learning from prompts", "recording": "recording the model",
    "recording on-policy": "recording what is learnt", "condition": "learning through the model", "guidance": "guidance redirector",
    "calibration": "calibration", "check": "asking the model",
}  # fmt: skip
SHOW_EVERY, SAVE_EVERY = 3.0, 30.0  # seconds
NEARLY_ALL = 0.9  # of the time left: a part that takes this is not told apart
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
        self.spent: dict[str, float] = dict.fromkeys(parts, 0.0)
        self.shown = 0.0
        self.saved = self.last = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds that are expected to remain."""
        return sum(seconds * (1 - self.done[name]) for name, seconds in self.parts.items())

    def lines(self) -> list[str]:
        """Every part of the training with its own time: what it took, and what it is expected to take yet."""
        return [f"{NAMES.get(part, part)}: {self._time_of(part)}" for part in self.done]

    def _time_of(self, part: str) -> str:
        done, spent, seconds = self.done[part], self.spent.get(part, 0.0), self.parts.get(part, 0.0)
        if done >= 1:
            return f"done, {in_words(spent)}" if spent >= 1 else "done"
        left = f"about {in_words(seconds * (1 - done))}" if seconds * (1 - done) >= 1 else "a moment"
        return f"{100 * done:.0f} % in {in_words(spent)}, {left} left" if done else f"to come, {left}"

    def rate(self, part: str, seconds: float) -> None:
        """Replaces the expectation of a part by what was measured."""
        self.parts[part] = seconds

    def finish(self, part: str) -> None:
        """Nothing of a part is left to do, also where an earlier run did it."""
        if part in self.done:
            self.done[part] = 1.0

    def update(self, part: str, share: float, message: str) -> None:
        """A part is done by `share` in [0, 1]; raises core's InterruptProcessingException when the user cancels."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        self.done[part], self.spent[part], self.last = share, self.spent.get(part, 0.0) + now - self.last, now
        if now - self.saved > SAVE_EVERY:
            self.save()
            self.saved = time.monotonic()
        if now - self.shown > SHOW_EVERY or share >= 1:
            self.shown = now
            total = sum(self.parts.values()) or 1.0
            picture = ("JPEG", self.draw(), PREVIEW_SIZE)
            self.bar.update_absolute(round(UNITS * (1 - self.left / total)), UNITS, picture)
            of_part = self.parts.get(part, 0.0) * (1 - share)
            here = f", {in_words(of_part)} of this" if 1 <= of_part < NEARLY_ALL * self.left else ""
            # The time first: a node shows two lines or so.
            self.say(f"about {in_words(self.left)} left{here}: {message}" if self.left else message)
