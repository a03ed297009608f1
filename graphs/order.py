"""The order of calls that a model leaves open.

A model may call one module several times in an order that means nothing: Gemma 3 asks its rotary embedding
for the tables of every kind of layer, and goes over a set of these kinds, which has another order in every
process. Such calls are put in the order in which their results are first read: calls of one module that
follow each other, with no modules inside of it and no op of others between them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch

from graphs.interpret import resolve
from graphs.ir import Op, OpGraph

_CALL = re.compile(r"@\d+")
"""What torch adds to the path of a module at its second call, and at those after it."""

Use = tuple[int, int]
"""Where a tensor is read: how many ops before the last one, and as which of its operands, counted from the
last."""


def module_of(call: str) -> str:
    """The path of a module in the name of a call of it: `model.rotary_emb` of `model.rotary_emb@1`."""
    return _CALL.sub("", call)


def in_order_of_use(graph: OpGraph) -> OpGraph:
    """The graph, whose ops say which call of a module they belong to, with independent calls one after the
    other in the order in which their results are first read, and ops that say only the module."""
    first_use: dict[str, Use] = {name: (0, -index) for index, name in enumerate(graph.outputs)}
    backwards: list[Op] = []
    runs = [list(run) for _, run in groupby(graph.ops, key=lambda op: module_of(op.module))]
    for run in reversed(runs):
        calls = [list(call) for _, call in groupby(run, key=lambda op: op.module)]
        if len(calls) > 1 and _are_interchangeable(calls):
            calls.sort(key=lambda call: _first_use(call, first_use), reverse=True)
        for op in reversed([op for call in calls for op in call]):
            backwards.append(replace(op, module=module_of(op.module)))
            for index, name in reversed([*enumerate(op.inputs)]):
                first_use[name] = (len(backwards), -index)
    return replace(graph, ops=tuple(reversed(backwards)))


def _first_use(call: Sequence[Op], known: dict[str, Use]) -> Use:
    """The first use of any of the results of a call."""
    return max((known[name] for op in call for name in op.outputs if name in known), default=(0, 0))


def _are_interchangeable(calls: Sequence[Sequence[Op]]) -> bool:
    """Whether no call reads what another one makes, and none draws random numbers."""
    made: set[str] = set()
    for call in calls:
        if any(_is_random(op) or not made.isdisjoint(op.inputs) for op in call):
            return False
        made.update(name for op in call for name in op.outputs)
    return True


def _is_random(op: Op) -> bool:
    return torch.Tag.nondeterministic_seeded in resolve(op.target).tags
