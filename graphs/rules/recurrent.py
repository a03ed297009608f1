"""Recurrent layers: samples are independent, nothing else is."""

from __future__ import annotations

from graphs.ir import Op, Tensor
from graphs.rules.arguments import arguments
from graphs.rules.build import WHOLE, make_rule
from graphs.rules.registry import register
from graphs.rules.rule import Dim, Rule


@register("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
def recurrent(op: Op, operands: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> Rule:
    """`x[t, b, h]`, or `[b, t, h]` with `batch_first`; states `[layers, b, h]`."""
    args = arguments(op)
    num_states = 2 if op.target.startswith("aten.lstm") else 1
    sequence: list[Dim] = [("b",), WHOLE, WHOLE] if args["batch_first"] else [WHOLE, ("b",), WHOLE]
    state: list[Dim] = [WHOLE, ("b",), WHOLE]
    if len(operands[0].shape) == 2:  # one sample
        sequence, state = [WHOLE, WHOLE], [WHOLE, WHOLE]
    weights = [[WHOLE] * len(tensor.shape) for tensor in operands[1 + num_states :]]
    return make_rule(
        operands,
        results,
        [sequence, *[state] * num_states, *weights],
        [sequence, *[state] * (len(results) - 1)],
    )
