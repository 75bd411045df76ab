"""Which words make a prompt harmful, and the prompt without them. Pure text: the reading of texts is given as a function.

What is no word stays to the letter: brackets and weights, commas, BREAK, embeddings, wildcards, tags of LoRAs.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from re import compile as pattern

from torch import Tensor

# Texts -> by how much each exceeds its thresholds (N,), in log odds; harmful above 0.
Excess = Callable[[Sequence[str]], Tensor]
Span = tuple[int, int]  # first character of a word, and the one behind its last

KEPT = pattern(
    r"embedding:\S+|<[^<>]*>|__[^\s_](?:[^\s]*?[^\s_])?__|\\[()]|:\s*-?\d+(?:\.\d+)?(?=\s*\))|[()\[\]{}|,;.!?\"]|\bBREAK\b|\bAND\b"
)
EMPTY = pattern(r"\(\s*(?::\s*-?\d+(?:\.\d+)?\s*)?\)|\[\s*\]")
CLAUSE_ENDS = pattern(r"[,;.!?|\n]|\bBREAK\b")
JOINTS = "and|or|with|of|in|on|at|by|from|under|over|near|beside"
ARTICLE, NO_NOUN = pattern(r"\b(?:an?|the)\s*$", re.I), pattern(rf"\s*(?:$|[,.;:!?)\]}}|\n]|(?:{JOINTS})\b)", re.I)
NOTHING_BEFORE, JOINT_AFTER = pattern(r"(?:^|[,.;!?(\[{|\n])\s*$"), pattern(r"^\s*(?:and|or|with|of)\b", re.I)
JOINT_BEFORE = pattern(rf"\b(?:{JOINTS})\s*$", re.I)
MOST_WORDS = 300  # of a prompt that are tried one by one: more would be minutes of encoding


def words_in(text: str) -> list[Span]:
    """The places of the words that can be left out: everything but spaces and what `KEPT` matches."""
    kept = [False] * len(text)
    for match in KEPT.finditer(text):
        kept[match.start() : match.end()] = [True] * (match.end() - match.start())
    free = "".join(" " if k or c.isspace() else "x" for k, c in zip(kept, text, strict=True))
    return [match.span() for match in re.finditer("x+", free)]


def clauses_of(text: str, words: Sequence[Span]) -> list[list[int]]:
    """Numbers of the words that stand between the same commas, full stops and line ends."""
    ends = [match.start() for match in CLAUSE_ENDS.finditer(text)]
    groups: dict[int, list[int]] = {}
    for i, (start, _) in enumerate(words):
        groups.setdefault(sum(end <= start for end in ends), []).append(i)
    return list(groups.values())


def without(text: str, spans: Iterable[Span], filler: str = "") -> str:
    """The text without the words at `spans`; each run of them is replaced by `filler`. What surrounded them is tidied up.

    Doubled spaces and commas, and brackets around nothing, go with the words; everything else stays to the letter.
    """
    for start, end in sorted(_runs(text, spans), reverse=True):
        before, after = text[:start], text[end:]
        text = _tidied(*_joints_left_out(before, after)) if not filler else before + filler + after
    return text


def _joints_left_out(before: str, after: str) -> tuple[str, str]:
    """The two sides of a gap without an article before it, and without `and` or `with` beside it, that have nothing to join now."""
    if NO_NOUN.match(after):
        before = ARTICLE.sub("", before)
    if NOTHING_BEFORE.search(before):
        after = JOINT_AFTER.sub("", after)
    elif NO_NOUN.match(after):
        before = JOINT_BEFORE.sub("", before)
    return before, after


def _runs(text: str, spans: Iterable[Span]) -> list[Span]:
    """Spans with nothing but spaces between them as one."""
    runs: list[Span] = []
    for start, end in sorted(spans):
        if runs and not text[runs[-1][1] : start].strip():
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def _tidied(before: str, after: str) -> str:
    """Two sides of a gap put together: one space or one comma between them, no brackets around nothing."""
    inner = re.search(r"([(\[])\s*$", before)
    closing = re.match(r"\s*(?::\s*-?\d+(?:\.\d+)?\s*)?([)\]])", after)
    if inner and closing and EMPTY.fullmatch(before[inner.start() :] + after[: closing.end()]):
        return _tidied(before[: inner.start()], after[closing.end() :])
    left, right = before.rstrip(" "), after.lstrip(" ")
    if not left or left[-1] in ",\n([{|" or left.endswith("BREAK"):
        # A list's entry is gone: its comma goes, too.
        right = re.sub(r"^,[ ]*", "", right) if not left or left[-1] in ",\n([{|" else right
        space = before[len(left) :] or (" " if left.endswith((",", "BREAK")) else "")
        return left + (space if right and not right.startswith((")", "]", "}", "|", "\n")) else "") + right
    joint = "" if not right or right[0] in ",.;:!?)]}|\n" else " "
    return left + joint + right


@dataclass(frozen=True)
class Redaction:
    """A prompt without what made it harmful: the new text, the words that were left out, and what is still exceeded (log odds)."""

    text: str
    left_out: tuple[str, ...]
    excess: float

    @property
    def clean(self) -> bool:
        """Whether what is left is at most at every threshold."""
        return self.excess <= 0


def redact(text: str, excess: Excess, filler: str = "") -> Redaction:
    """Leaves out a smallest set of words with which a prompt is harmful; none of them can be put back.

    Clauses that are harmful by themselves are searched first. `filler` stands in place of each run of words, where the prompt is
    clean with it. A text that is not harmful comes back as it is.
    """
    worst = float(excess([text])[0])
    words = words_in(text)
    if worst <= 0 or not words:
        return Redaction(text, (), worst)
    gone = _enough(text, words, excess)
    gone = _needed(text, words, gone, excess)
    spans = [words[i] for i in sorted(gone)]
    candidates = [without(text, spans, filler), without(text, spans)] if filler else [without(text, spans)]
    values = excess(candidates).tolist()
    chosen = 0 if values[0] <= 0 else len(candidates) - 1
    return Redaction(candidates[chosen], tuple(text[a:b] for a, b in _runs(text, spans)), values[chosen])


def _enough(text: str, words: list[Span], excess: Excess) -> set[int]:
    """Words without which the text is clean, found one after the other; all of them where nothing less is enough."""
    gone: set[int] = set()
    order = _suspects(text, words, excess)
    while len(gone) < len(words):
        left = [i for i in order if i not in gone] or [i for i in range(len(words)) if i not in gone]
        values = excess([without(text, [words[j] for j in (*gone, i)]) for i in left[:MOST_WORDS]])
        gone.add(left[int(values.argmin())])
        if float(values.min()) <= 0:
            break
    return gone


def _suspects(text: str, words: list[Span], excess: Excess) -> list[int]:
    """The words of the clauses that are harmful by themselves; of all clauses where none is."""
    clauses = clauses_of(text, words)
    if len(clauses) < 2:
        return list(range(len(words)))
    values = excess([text[words[group[0]][0] : words[group[-1]][1]] for group in clauses])
    return [i for group, value in zip(clauses, values.tolist(), strict=True) if value > 0 for i in group]


def _needed(text: str, words: list[Span], gone: set[int], excess: Excess) -> set[int]:
    """Of the words left out, those that cannot be put back."""
    for i in sorted(gone):
        rest = gone - {i}
        if rest and float(excess([without(text, [words[j] for j in rest])])[0]) <= 0:
            gone = rest
    return gone


def blame(text: str, excess: Excess) -> list[tuple[Span, float]]:
    """How much less harmful, in log odds, a prompt is without each of its words."""
    words = words_in(text)[:MOST_WORDS]
    if not words:
        return []
    values = excess([text, *(without(text, [span]) for span in words)])
    return list(zip(words, (values[0] - values[1:]).tolist(), strict=True))


def differing(harmful: str, safe: str) -> list[Span]:
    """The places of the words of a harmful prompt that its safe partner has not at that place."""
    spans = words_in(harmful)
    ours, theirs = ([text[a:b].casefold() for a, b in places] for text, places in ((harmful, spans), (safe, words_in(safe))))
    blocks = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    same = {i for block in blocks for i in range(block.a, block.a + block.size)}
    return [span for i, span in enumerate(spans) if i not in same]


def redacted_pair(harmful: str, safe: str, filler: str = "") -> str:
    """A harmful prompt without the words that its safe partner lacks, or with `filler` in their place.

    Unlike the partner it can be predicted from the harmful prompt alone: a target for training in text space. "" where nothing
    is left.
    """
    return without(harmful, differing(harmful, safe), filler)
