"""Tensors are found in every structure that other packs keep prompts in, and can be exchanged there."""

import collections
import dataclasses
import functools
import types
import weakref

import numpy as np
import pytest
import torch
from safecfg.nodes.redirect import search as module
from safecfg.nodes.redirect.search import Search

KEPT_IN_A_MODULE = [torch.zeros(1)]


@dataclasses.dataclass
class Data:
    tokens: object


@dataclasses.dataclass(frozen=True)
class Frozen:
    tokens: object


class Slots:
    __slots__ = ("tokens",)

    def __init__(self, tokens):
        self.tokens = tokens


class Patch:
    def __init__(self, tokens):
        self.tokens = tokens

    def patch(self, q):
        return self.tokens

    def __call__(self, q):
        return self.tokens


class Proxy:
    def __init__(self, function):
        self.function = function


class Layer(torch.nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.register_buffer("tokens", tokens)
        self.weight = torch.nn.Parameter(torch.zeros(3, 16))


Named = collections.namedtuple("Named", "tokens strength")


def closure(tokens):
    def patch(q):
        return tokens

    return patch


def closure_in_a_closure(tokens):
    inner = closure([tokens])

    def patch(q):
        return inner(q)

    return patch


def default(tokens):
    def patch(q, conds=tokens, *, more=None):
        return conds

    return patch


def decorated(tokens):
    @functools.wraps(closure(tokens))
    def patch(q):
        return patch.__wrapped__(q)

    return patch


def of_a_module(tokens):
    KEPT_IN_A_MODULE[0] = tokens
    return eval_globals


def eval_globals(q):
    return KEPT_IN_A_MODULE


def of_a_class(tokens):
    kind = type("Shared", (), {"tokens": tokens, "__call__": lambda self, q: self.tokens})
    return kind()


HOLDERS = {  # how tokens are kept, and how they are read again
    "a list": (lambda t: [t], lambda h: h[0]),
    "a dict": (lambda t: {"conds": {7: t}}, lambda h: h["conds"][7]),
    "tuples": (lambda t: [(1, (t, t))], lambda h: h[0][1][1]),
    "a named tuple": (lambda t: {"a": Named(t, 1.0)}, lambda h: h["a"].tokens),
    "a deque": (lambda t: collections.deque([None, t]), lambda h: h[1]),
    "an object": (Patch, lambda h: h.tokens),
    "a dataclass": (Data, lambda h: h.tokens),
    "a frozen dataclass": (lambda t: Frozen([t]), lambda h: h.tokens[0]),
    "a frozen field": (Frozen, lambda h: h.tokens),
    "slots": (Slots, lambda h: h.tokens),
    "a namespace": (lambda t: types.SimpleNamespace(a=t), lambda h: h.a),
    "a bound method": (lambda t: Patch(t).patch, lambda h: h(0)),
    "a method in a proxy": (lambda t: Proxy(Patch(t).patch), lambda h: h.function(0)),
    "a closure": (closure, lambda h: h(0)),
    "a closure in a closure": (closure_in_a_closure, lambda h: h(0)[0]),
    "a default": (default, lambda h: h(0)),
    "a decorated function": (decorated, lambda h: h(0)),
    "a partial's argument": (lambda t: functools.partial(lambda a, q: a, t), lambda h: h(0)),
    "a partial's keyword": (lambda t: functools.partial(lambda q, a: a, a=t), lambda h: h(0)),
    "a module's variable": (of_a_module, lambda h: h(0)[0]),
    "a class's attribute": (of_a_class, lambda h: h(0)),
    "a buffer of a network": (Layer, lambda h: h.tokens),
    "a weak reference": (lambda t: [p := Patch(t), weakref.ref(p)][1:] + [p], lambda h: h[1].tokens),
    "an array": (lambda t: [t.numpy()], lambda h: h[0]),
}


def search(value):
    found = Search(lambda v: v.shape[-1:] == (16,))
    found.look(value, "patch")
    return found


@pytest.mark.parametrize("name", HOLDERS)
def test_tokens_are_found_and_exchanged(name):
    make, read = HOLDERS[name]
    tokens, other = torch.randn(1, 7, 16), torch.randn(1, 7, 16)
    holder = make(tokens)
    found = search(holder)
    assert found.complete and found.finds and all(np.array_equal(f.value, tokens) for f in found.finds)
    for find in found.finds:
        find.put(other if isinstance(find.value, torch.Tensor) else other.numpy())
    assert np.array_equal(read(holder), other)
    for find in found.finds:
        find.put(find.value)
    assert np.array_equal(read(holder), tokens)


def test_what_holds_none_is_left_alone():
    cycle = {"text": "a cat", "n": 3}
    cycle["self"] = [cycle]
    frozen = frozenset({torch.zeros(3, 15)})
    found = search([cycle, frozen, torch.nn.Linear(16, 16), Layer(torch.zeros(2, 4)), {"proj.weight": torch.zeros(4, 16)}])
    assert found.complete and not found.finds


def test_what_cannot_be_exchanged_says_so():
    (find,) = search(frozenset({torch.zeros(3, 16)})).finds
    assert find.put is None


def test_a_search_ends_where_it_must_and_only_there(monkeypatch):
    deep = tokens = torch.zeros(1, 16)
    for _ in range(3000):
        deep = [deep]
    found = search(deep)
    assert found.complete and found.finds[0].value is tokens and len(found.finds[0].path) < 200
    monkeypatch.setattr(module, "LIMIT", 10)
    assert not search([[i] for i in range(20)]).complete
