"""Random ops, and how ranks draw the same numbers for what they hold alike, and others for what is split.

`seed_step` of the runtime gives the ranks of a tensor axis the same numbers, and those of other axes their
own. An op that these do not suit draws by functions of the runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from autopar.localize import CAUSAL_ROWS
from autopar.op_kinds import has_dropout
from autopar.placements import Shard, State
from autopar.rewrite.expressions import Expression, Values
from autopar.rewrite.scope import Render
from graphs.interpret import resolve
from graphs.ir import Op
from graphs.rules.arguments import arguments

_OWN_NUMBERS = ("dp", "cp")
"""Axes whose ranks draw numbers of their own, unless they draw together."""

_SWITCHES = {"p": 0.0, "dropout": 0.0, "dropout_p": 0.0, "train": False, "training": False}
"""Arguments of random ops, with the value with which they draw nothing."""


def is_random(op: Op) -> bool:
    """Whether an op draws random numbers: dropout with probability 0 or outside of training does not."""
    if op.target == CAUSAL_ROWS:
        return has_dropout(op)
    if not op.target.startswith("aten.") or torch.Tag.nondeterministic_seeded not in resolve(op.target).tags:
        return False
    given = arguments(op)
    return not any(name in given and given[name] == off for name, off in _SWITCHES.items())


def draws_together(op: Op, states: Mapping[str, State]) -> bool:
    """Whether ranks that otherwise have numbers of their own draw the same: those of a data or a context axis
    along which the result of the op, whose states by axis these are, is not split."""
    held_alike = any(axis in states and not isinstance(states[axis].value, Shard) for axis in _OWN_NUMBERS)
    return held_alike and is_random(op)


def axes_apart(op: Op, states: Mapping[str, State]) -> tuple[str, ...]:
    """The axes along which the result is split though their ranks would draw the same numbers."""
    if not is_random(op):
        return ()
    alike = ("tp", *(_OWN_NUMBERS if draws_together(op, states) else ()))
    return tuple(axis for axis, state in states.items() if axis in alike and isinstance(state.value, Shard))


def drawn(op: Op, states: Mapping[str, State], render: Render) -> Render:
    """The expression of an op, with the functions of the runtime by which it draws around it."""
    for axis in axes_apart(op, states):
        render = partial(_within, f"drawn_apart(self.{axis}, lambda: {{}})", render)
    return partial(_within, "drawn_together(lambda: {})", render) if draws_together(op, states) else render


def _within(call: str, render: Render, values: Values) -> Expression:
    return Expression(call.format(render(values).text))
