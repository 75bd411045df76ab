"""The held-out split: by subject, so that nothing held out was trained in other words."""

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from .types import normalised

CLEAN = ""  # the group of clean prompts, beside the categories


class Part(NamedTuple):
    """What the split sees of a pair or a clean prompt. `held_out` is None where the split decides."""

    groups: frozenset[str]
    subject: str
    prompts: tuple[str, ...]
    held_out: bool | None


def split(parts: Sequence[Part], share: float, clean_share: float, seed: int) -> tuple[list[bool], set[str]]:
    """Whether each part is held out, and the groups of which nothing could be, because they have one subject only.

    Parts of one subject, or with a prompt in common, stay together. Of every group at least one subject is held out and one is
    left (where it has two), about `share` of its parts in all, and `clean_share` of the clean ones. The same arguments always give the same split.
    """
    names = _together([(("subject", p.subject), *(("prompt", normalised(t)) for t in p.prompts)) for p in parts])
    sizes: dict[Hashable, Counter] = {}
    for name, part in zip(names, parts, strict=True):
        if part.held_out is None:
            sizes.setdefault(name, Counter()).update(part.groups)
    trained = {group for part in parts if part.held_out is False for group in part.groups}
    held, alone = _hold_out(sizes, trained, {CLEAN: clean_share}, share, seed) if share else (set(), set())
    return [name in held if part.held_out is None else part.held_out for name, part in zip(names, parts, strict=True)], alone


def _together(keys: Sequence[tuple[Hashable, ...]]) -> list[Hashable]:
    """A name for each item; items that share a key, directly or through others, have the same one."""
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for first, *others in keys:
        for other in others:
            parent[root(other)] = root(first)
    return [root(first) for first, *_ in keys]


def _hold_out(
    sizes: dict[Hashable, Counter], trained: set[str], shares: dict[str, float], share: float, seed: int
) -> tuple[set[Hashable], set[str]]:
    order = random.Random(f"{seed} held out").sample(sorted(sizes), len(sizes))  # type: ignore[type-var]  # parts are texts or tuples of texts
    members: dict[str, list] = {}
    for name in order:
        for group in sorted(sizes[name]):
            members.setdefault(group, []).append(name)
    total = {group: sum(sizes[name][group] for name in names) for group, names in members.items()}
    left = Counter({group: len(names) + (group in trained) for group, names in members.items()})
    alone = {group for group, count in left.items() if count == 1}
    held: set[Hashable] = set()
    done: Counter = Counter()
    for group in sorted(members, key=lambda g: (len(members[g]), g)):  # those with the least choice first
        wanted = shares.get(group, share) * total[group]
        limit = max(1.0, wanted)
        # Subjects with very many parts come last, and only where nothing else can be held out.
        for name in sorted(members[group], key=lambda n: max(0.0, sizes[n][group] - limit)):
            if done[group] >= wanted or (sizes[name][group] > limit and done[group]):
                break
            if name not in held and all(left[g] > 1 for g in sizes[name]):
                held.add(name)
                done.update(sizes[name])
                left.subtract(dict.fromkeys(sizes[name], 1))
    return held, alone
