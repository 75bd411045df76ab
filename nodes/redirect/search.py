"""Finds tensors in whatever other nodes leave in a run: containers, objects, closures, bound methods, partial functions.

It reads Python's own structures only and calls nothing of theirs. Every find knows how to put another tensor in its place.
"""

import enum
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LIMIT = 50_000  # values in one search; more is not text
PATH = 120  # letters of a place's name that are kept: the last ones
STATE = 256  # entries of a module's variable; larger ones are tables of nodes, words and the like
LEAVES = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    bool,
    type(None),
    range,
    slice,
    enum.Enum,
    torch.device,
    torch.dtype,
    torch.Generator,
    torch.nn.Parameter,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.CodeType,
    types.FrameType,
    types.GeneratorType,
)
LEAF_KINDS = frozenset(LEAVES)
# Nobody keeps prompts in objects of these packages' classes, and some are large. Their subclasses in other packs are searched.
FOREIGN = frozenset({"torch", "numpy", "builtins", "threading", "_thread", "logging", "ctypes", "asyncio", "concurrent", "PIL"})
CONTAINERS = frozenset({dict, list, tuple})
NO_TOKENS = (".weight", ".bias", "pooled_output")  # ends of keys of what is no text: a network's state, a prompt's pooled vector

Setter = Callable[[object], None]
Array = Tensor | np.ndarray


@dataclass(frozen=True, eq=False)
class Find:
    """A tensor (or array) at `path`, such as `patch.conds[1]`; `put` exchanges it where it is, None: it cannot be exchanged."""

    value: Array
    path: str
    put: Setter | None

    def exchange(self, value: object) -> None:
        """Puts another value where the tensor is; raises TypeError where nothing can be put, or what the owner raises."""
        if self.put is None:
            raise TypeError(f"{self.path} cannot be exchanged.")
        self.put(value)


class Search:
    """One search. `wanted`: the tensors to find; `skip`: tells values, `skip_keys` a dict's entries that must not be looked into.

    `complete` is False when there was more to look at than `LIMIT`. What was seen is kept alive until the search is dropped:
    ids of freed objects are used again.
    """

    def __init__(
        self,
        wanted: Callable[[object], bool],
        skip: Callable[[object], bool] = lambda value: False,
        skip_keys: frozenset = frozenset(),
    ):
        self.wanted, self.skip, self.skip_keys = wanted, skip, skip_keys
        self.finds: list[Find] = []
        self.complete = True
        self.holders = 0  # functions and objects: what they hold may be other things later
        self._seen: dict[int, object] = {}
        self._looked = 0

    def look(self, value: object, path: str = "", put: Setter | None = None) -> None:
        """Adds what `value` is or holds: nearest first, as deep as it goes."""
        waiting = deque([(value, path, put)])
        while waiting:
            value, path, put = waiting.popleft()
            kind = type(value)
            if kind in LEAF_KINDS or (kind in CONTAINERS and not value) or isinstance(value, LEAVES):
                continue
            if isinstance(value, (Tensor, np.ndarray)):
                if self.wanted(value):
                    self.finds.append(Find(value, path, put))
                continue
            # A tuple is exchanged in each of its owners; what can be changed in place needs one look.
            if (id(value) in self._seen and kind is not tuple) or self.skip(value):
                continue
            self._seen[id(value)] = value
            self._looked += 1
            if self._looked > LIMIT:
                self.complete = False
                return
            self.holders += kind not in CONTAINERS
            waiting += [
                (child, f"{path[-PATH:]}{name}", put_child) for child, name, put_child in _children(value, put, self.skip_keys)
            ]


def _children(value: object, put: Setter | None, skip_keys: frozenset) -> Iterable[tuple[object, str, Setter | None]]:
    if isinstance(value, (dict, Mapping)):
        return _of_mapping(value, skip_keys)
    if isinstance(value, (list, deque)):
        return [(child, f"[{i}]", functools.partial(value.__setitem__, i)) for i, child in enumerate(value)]
    if isinstance(value, tuple):
        return _of_tuple(value, put)
    if isinstance(value, (set, frozenset)):
        return [(child, "{}", None) for child in value]
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if isinstance(value, types.MethodType):
        return [(value.__self__, "", None), (value.__func__, "", None)]
    if isinstance(value, functools.partial):
        return _of_partial(value)
    if isinstance(value, weakref.ReferenceType):
        return [(value(), "", None)]
    if isinstance(value, type):
        return _of_class(value)
    return _of_object(value)


def _of_mapping(value: Mapping, skip_keys: frozenset) -> Iterable:
    settable = value if isinstance(value, MutableMapping) else None
    for key, child in list(value.items()):
        if key not in skip_keys and not (isinstance(key, str) and key.endswith(NO_TOKENS)):
            name = f"[{key!r}]" if isinstance(key, (str, int)) else "[...]"
            yield child, name, None if settable is None else functools.partial(settable.__setitem__, key)


def _of_tuple(value: tuple, put: Setter | None) -> Iterable:
    """A tuple is made again, and put where it was; several exchanges in it add up."""
    items = list(value)

    def put_item(put: Setter, i: int, new: object) -> None:
        items[i] = new
        put(type(value)(*items) if hasattr(value, "_fields") else tuple(items))

    return [(child, f"[{i}]", functools.partial(put_item, put, i) if put else None) for i, child in enumerate(value)]


def _of_function(function: types.FunctionType) -> Iterable:
    name = f"{function.__qualname__.rpartition('<locals>.')[2]}"
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            child = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        yield child, f" {name}: {variable}", functools.partial(setattr, cell, "cell_contents")
    yield function.__defaults__, f" {name}: default", functools.partial(setattr, function, "__defaults__")
    yield function.__kwdefaults__, f" {name}: default", None
    yield function.__dict__ or None, f" {name}", None
    known = function.__globals__
    for variable in function.__code__.co_names:  # state of a module that the function reads
        child = known.get(variable)
        if isinstance(child, Tensor) or (type(child) in CONTAINERS and len(child) <= STATE):
            yield child, f" {name}: {variable}", functools.partial(known.__setitem__, variable)


def _of_partial(value: Any) -> Iterable:
    yield value.func, "", None

    def put_arguments(arguments: tuple) -> None:
        value.__setstate__((value.func, arguments, value.keywords, value.__dict__ or None))

    yield value.args, "", put_arguments
    yield value.keywords, "", None


def _of_class(kind: type) -> Iterable:
    """The values of a class's own attributes, not its methods."""
    if kind.__module__.partition(".")[0] in FOREIGN:
        return
    for name, child in list(vars(kind).items()):
        if not name.startswith("__") and not callable(child) and not isinstance(child, (classmethod, staticmethod, property)):
            yield child, f".{name}", functools.partial(setattr, kind, name)


def _of_object(value: object) -> Iterable:
    kind = type(value)
    if kind.__module__.partition(".")[0] in FOREIGN:
        return
    state = getattr(value, "__dict__", None)
    state = state if isinstance(state, dict) else {}
    for name, child in list(state.items()):
        if name != "_parameters":  # of a torch.nn.Module: weights
            yield child, f".{name}", functools.partial(state.__setitem__, name)
    for parent in kind.__mro__:
        slots = parent.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            member = parent.__dict__.get(name)
            if isinstance(member, types.MemberDescriptorType) and hasattr(value, name):
                yield getattr(value, name), f".{name}", functools.partial(object.__setattr__, value, name)
    yield from _of_class(kind)
