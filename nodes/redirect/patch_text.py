"""Prompts that other nodes keep outside the conditions' own keys, found, judged and redirected for one run.

Regional and couple nodes keep the tokens of a region in patches of the model, in hooks of a condition, or in objects of their
own; no hook of core's sees them. What has the HGR's token width is read by the condition redirector; flagged tokens are exchanged
where they are, in all places, for this run, and put back when it ends.
"""

import weakref
from collections.abc import Iterable
from re import compile as pattern

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ... import hgr_models
from ..host.families import Text
from ..host.hooks import KEY, NEGATIVE_ROLES
from ..host.more_tokens import TOKENS
from .nan_guard import unreadable_prompt
from .places import identities_of, lengths_of, options_of, other_places, search_for
from .runs import Run
from .search import Array, Find, Search

NEGATIVE, POSITIVE = (
    pattern(rf"(?:^|[^a-z])(?:{words})(?:[^a-z]|$)") for words in ("neg|negatives?|unconds?|nocond|empty|null", "pos|positives?")
)
NAMES = pattern(r"[A-Za-z_]\w*")
NEUTRAL = frozenset(
    {"model_conds", "c_crossattn", "cross_attn", "cond", "conds", "tokens"}
)  # names that any prompt's tokens have


class PatchText:
    """What a run found. `redirected`: the places of the prompts that were exchanged, for the log."""

    def __init__(self) -> None:
        self.redirected: list[str] = []
        self._judged: dict[int, weakref.ref] = {}  # tensors that were read, or are redirected already
        self._exchanged: list[tuple[Find, Tensor, Tensor]] = []  # (place, original, redirected)
        self._outside = False  # of the run's window: originals are in their places
        self._safe: list[tuple[Tensor, Tensor]] = []  # (redirected, original)
        self._negatives: list[Tensor] = []
        self._lengths: set[int] = set()  # of the run's prompts, in tokens
        self._holders = 0  # that the last search of the model's options met
        self._patches: tuple = ()  # what the last search saw of the patches, by identity

    def find_all(self, run: Run, patcher: ModelPatcher, conds: dict[str, list[dict]]) -> None:
        """For the start of a run, when the HGR is loaded: everything that the run was given."""
        self._negatives = [t for role in NEGATIVE_ROLES for entry in conds.get(role, ()) if (t := entry.get(TOKENS)) is not None]
        for tokens in (entry.get(TOKENS) for role, es in conds.items() if not role.startswith(KEY) for entry in es):
            if tokens is not None:
                self._remember(tokens)  # read and redirected by conditions.py
                self._lengths.add(tokens.shape[-2])
        search = search_for(run)
        for label, value, put in options_of(run.guider.model_options):
            search.look(value, label, put)
        self._holders, self._patches = search.holders, identities_of(run.guider.model_options)
        for label, value, put in other_places(run, conds):
            search.look(value, label, put)
        self._finish(run, patcher, search)

    def find_new(self, run: Run, patcher: ModelPatcher, model_options: dict, x: Tensor, sigma: Tensor) -> None:
        """For every evaluation of a latent x: patches that came, or changed, in the run. Where there are none it costs microseconds.

        Outside the run's window the prompts are as they were.
        """
        patches = identities_of(model_options)
        changed = self._holders or patches != self._patches
        if not changed and not self._exchanged:
            return  # before the noise level is read, which waits for the device
        outside = not run.window.contains(sigma)
        if outside != self._outside and self._exchanged:
            self._exchange_again(run, outside, model_options)
        self._outside = outside
        if outside or not changed:
            return
        search = search_for(run)
        for label, value, put in options_of(model_options):
            search.look(value, label, put)
        self._holders, self._patches = search.holders, patches
        features = lengths_of(x.shape) - self._lengths
        search.finds = [find for find in search.finds if find.value.shape[-2] not in features]
        self._finish(run, patcher, search)

    def _finish(self, run: Run, patcher: ModelPatcher, search: Search) -> None:
        if not search.complete:
            run.notice(f"{run.guider_name}: other nodes' patches hold more than SafeCFG can search for prompts.")
        new = [find for find in search.finds if not self._knows(find.value) and not self._is_negative(find)]
        if new:
            self._judge(run, patcher, new)

    def _knows(self, value: Array) -> bool:
        """Whether a tensor was read already, or is a copy of one that we made safe."""
        known = self._judged.get(id(value))
        return (known is not None and known() is value) or any(_same(value, safe) for safe, _ in self._safe)

    def _remember(self, value: Array) -> None:
        self._judged[id(value)] = weakref.ref(value)

    def _is_negative(self, find: Find) -> bool:
        """Whether it is a negative prompt, which stays as it is: by its name, or because the guider's negative is the same."""
        telling = [name for name in NAMES.findall(find.path) if name not in NEUTRAL]
        names = " ".join(telling[-2:]).lower().replace("_", " ")
        if NEGATIVE.search(names) and not POSITIVE.search(names):
            return True
        return any(_same(find.value, negative) for negative in self._negatives)

    def _judge(self, run: Run, patcher: ModelPatcher, finds: list[Find]) -> None:
        """Reads every new tensor once, and exchanges the flagged ones wherever they are."""
        by_tensor: dict[int, list[Find]] = {}
        for find in finds:
            by_tensor.setdefault(id(find.value), []).append(find)
        for places in by_tensor.values():
            value = places[0].value
            if (tokens := _tokens_of(value)) is None:
                self._remember(value)
                continue
            result = _read(run, patcher, tokens, places[0].path)
            self._remember(value)
            if result is None:
                continue
            if run.settings.by_concept:
                run.concepts.add("positive", None, result.weights.amax(dim=0, keepdim=True))
            if run.settings.judges_only:
                continue
            self._exchange(run, value, _shaped_as(value, result.tokens), places)

    def _exchange(self, run: Run, original: Array, safe: Array, places: list[Find]) -> None:
        self._remember(safe)
        self._safe.append((safe, original))
        for find in places:
            try:
                find.exchange(safe)
                self._exchanged.append((find, original, safe))
            except Exception:  # whatever the owner says: it stays as it was
                run.notice(f"{run.guider_name}: a harmful prompt in {_where(find.path)} cannot be redirected there.")
        self.redirected.append(_where(places[0].path))

    def restore(self, run: Run) -> None:
        """Puts every original back, also where a copy of what we had put was made (on another device, in another list)."""
        if self._exchanged:
            self._exchange_again(run, True, run.guider.model_options)
        self._exchanged, self._safe = [], []

    def _exchange_again(self, run: Run, originals: bool, model_options: dict) -> None:
        """Puts the originals, or the redirected prompts, into all places, and wherever others have copied what was there.

        Core copies the run's options for its evaluations.
        """
        for find, original, safe in reversed(self._exchanged):
            find.exchange(original if originals else safe)
        wanted = {True: self._safe, False: [(original, safe) for safe, original in self._safe]}[originals]
        search = search_for(run)
        for places in (options_of(model_options), other_places(run, getattr(run.guider, "conds", None) or {})):
            for label, value, put in places:
                search.look(value, label, put)
        for find in search.finds:
            new = next((new for old, new in wanted if find.value is not new and _same(find.value, old)), None)
            if new is not None and find.put is not None and (originals or not self._is_negative(find)):
                find.exchange(new.to(find.value) if isinstance(new, Tensor) else new)


def _tokens_of(value: Array) -> Tensor | None:
    """Tokens (N, T, D) of a find; None for what has no negative values, as masks of the width have."""
    tokens = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return tokens.reshape(-1, *tokens.shape[-2:]) if bool((tokens < 0).any()) else None


def _shaped_as(value: Array, tokens: Tensor) -> Array:
    if isinstance(value, np.ndarray):
        return tokens.reshape(value.shape).cpu().numpy().astype(value.dtype)
    return tokens.reshape(value.shape).to(value)


def _read(run: Run, patcher: ModelPatcher, tokens: Tensor, path: str) -> hgr_models.ConditionResult | None:
    """What the condition redirector makes of tokens (N, T, D), if it flags any; the readings get what it saw."""
    text = Text(tokens.to(patcher.load_device), None, None)
    result = hgr_models.redirect_condition(patcher.model, text.tokens, None, run.settings.categories, None)
    harmfulness, weights = result.harmfulness.amax(dim=0, keepdim=True), result.weights.amax(dim=0, keepdim=True)
    values = torch.stack([harmfulness.float(), weights.float()]).cpu().numpy()
    role = f"prompt in {_where(path)}"
    if not np.isfinite(values[0]).all():
        raise unreadable_prompt(run, role, "harmfulness")
    run.readings.prompts.append((role, *values))
    run.meter.show_prompts()
    if not (values[1] > 0).any():
        return None
    if not bool(torch.isfinite(result.tokens).all()):
        raise unreadable_prompt(run, role, "redirection")
    return result


def _same(value: Array, other: Array) -> bool:
    """Whether two finds are the same text, on whatever device and in whatever dtype."""
    if value is other:
        return True
    if type(value) is not type(other) or value.shape != other.shape:
        return False
    return torch.equal(value, other.to(value)) if isinstance(value, Tensor) else np.array_equal(value, other)


def _where(path: str) -> str:
    """A place in a user's words: the last names of its path, which are those of the pack."""
    names: Iterable[str] = NAMES.findall(path)
    return ".".join(list(names)[-3:]) or "a patch"
