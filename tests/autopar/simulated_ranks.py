"""Run the local graphs of all ranks of one axis in one process, with collectives by their definition.

A conversion rebuilds the whole value from the state its tensor is in, and deals it out again in the state it
is converted to; its backward does the same to the gradient, the other way round. Nothing here knows the
runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.localize import CAUSAL_ROWS, Localized
from autopar.placements import RP, RR, Partial, Placement, Shard, State
from graphs.interpret import call
from graphs.ir import Op

Parts = list[Tensor]
"""A tensor of every rank."""


def deal(whole: Tensor, placement: Placement, size: int) -> Parts:
    """What each rank holds of a whole value; of a partial one the first rank holds all."""
    if isinstance(placement, Shard):
        order = _order(whole.shape[placement.dim], placement, size).to(whole.device)
        return [whole.index_select(placement.dim, mine) for mine in order.chunk(size)]
    if isinstance(placement, Partial):
        return [whole.clone() if rank == 0 else torch.zeros_like(whole) for rank in range(size)]
    return [whole.clone() for _ in range(size)]


def whole_of(parts: Sequence[Tensor], placement: Placement) -> Tensor:
    """The whole value; of a replicated one all ranks must hold the same."""
    if isinstance(placement, Shard):
        dealt = torch.cat(list(parts), placement.dim)
        order = _order(dealt.shape[placement.dim], placement, len(parts)).to(dealt.device)
        return dealt.index_select(placement.dim, order.argsort())
    if isinstance(placement, Partial):
        return torch.stack(list(parts)).sum(0)
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0], msg="ranks disagree on a replicated tensor")
    return parts[0]


def _order(extent: int, placement: Shard, size: int) -> Tensor:
    """The elements of a dimension as the ranks hold them, one rank after the other."""
    owner = []
    for section in placement.sections or (extent,):
        place = torch.arange(section)
        if placement.zigzag:
            number = place * 2 * size // section
            owner.append(number.minimum(2 * size - 1 - number))
        else:
            owner.append(place * size // section)
    return torch.cat(owner).argsort(stable=True)


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx, before: State, after: State, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.before, ctx.after = before, after
        return tuple(deal(whole_of(parts, before.value), after.value, len(parts)))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        whole = whole_of(gradients, ctx.after.grad)
        return None, None, *deal(whole, ctx.before.grad, len(gradients))


def convert(parts: Sequence[Tensor], before: State, after: State) -> Parts:
    """A change of state, differentiable."""
    return list(_Convert.apply(before, after, *parts))


def run(local: Localized, axis: str, size: int, wholes: Mapping[str, Tensor]) -> dict[str, Parts]:
    """Every tensor of every rank, from the whole inputs, parameters and buffers.

    Parameters are leaves with gradients.
    """
    graph = local.graph
    values: dict[str, Parts] = {}
    for name, whole in wholes.items():
        parts = deal(whole, local.states[name].get(axis, RR).value, size)
        grad = name in graph.parameter_tensors
        values[name] = [part.detach().requires_grad_(grad) for part in parts]
    for op in graph.ops:
        values.update(_step(local, op, axis, size, values))
        for name in op.outputs:
            for part in values.get(name, ()):
                assert tuple(part.shape) == graph.tensors[name].shape, f"{op.name}: shape of {name}"
    return values


def _step(local: Localized, op: Op, axis: str, size: int, values: Mapping[str, Parts]) -> dict[str, Parts]:
    if op.target == "autopar.embedding":
        return {op.output: [_lookup(op, values, rank, size) for rank in range(size)]}
    if op.target == "autopar.batch_norm":
        return {op.output: _batch_norm(op, local, axis, values)}
    if op.target == "autopar.cross_entropy":
        return {op.output: _cross_entropy(op, local, axis, values)}
    if op.target == CAUSAL_ROWS:
        return {op.output: _causal_attention(op, local, axis, values)}
    if op.target.startswith("autopar."):
        (source,) = op.inputs
        before, after = (local.states[name].get(axis, RR) for name in (source, op.output))
        return {op.output: convert(values[source], before, after)}
    ranks = [call(op, {name: values[name][rank] for name in op.inputs}) for rank in range(size)]
    return {name: [results[name] for results in ranks] for name in ranks[0]}


def _lookup(op: Op, values: Mapping[str, Parts], rank: int, size: int) -> Tensor:
    weight, indices = (values[name][rank] for name in op.inputs)
    start = rank * weight.shape[0]
    mine = (indices >= start) & (indices < start + weight.shape[0])
    return weight[(indices - start).where(mine, 0)] * mine.unsqueeze(-1)


def _causal_attention(op: Op, local: Localized, axis: str, values: Mapping[str, Parts]) -> Parts:
    """Of all queries on every rank, which then keeps its own."""
    query, state = op.inputs[0], local.states[op.output][axis]
    whole = {**values, query: convert(values[query], local.states[query][axis], RP)}
    kwargs = {key: value for key, value in op.kwargs.items() if key not in {"row_axis", "zigzag"}}
    plain = replace(op, target="aten.scaled_dot_product_attention.default", kwargs=kwargs)
    size = len(values[query])
    attended = (call(plain, {name: whole[name][rank] for name in op.inputs}) for rank in range(size))
    return [deal(each[op.output], state.value, size)[rank] for rank, each in enumerate(attended)]


def _batch_norm(op: Op, local: Localized, axis: str, values: Mapping[str, Parts]) -> Parts:
    """Of the whole rows; each rank then has its own."""
    whole = [convert(values[name], local.states[name].get(axis, RR), RR) for name in op.inputs]
    given = []
    for x, *affine in zip(*whole, strict=True):
        weight, bias = affine or (None, None)
        given.append(F.batch_norm(x, None, None, weight, bias, training=True, eps=op.args[7]))
    return convert(given, RR, local.states[op.output][axis])


def _cross_entropy(op: Op, local: Localized, axis: str, values: Mapping[str, Parts]) -> Parts:
    """Of the whole rows and classes; each rank then has it, or the first one all of it."""
    logits, target = op.inputs[:2]
    known = [convert(values[name], local.states[name].get(axis, RR), RR) for name in (logits, target)]
    options = dict(zip(("reduction", "ignore_index", "label_smoothing"), op.args[3:], strict=False))
    names = ("none", "mean", "sum")
    whole = [
        F.cross_entropy(x, y, **{**options, "reduction": names[options.get("reduction", 1)]})
        for x, y in zip(*known, strict=True)
    ]
    return convert(whole, RR, local.states[op.output][axis])
