"""What a rule claims, done by hand: split the operands of a call, run every shard, join the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch.nn import functional

from graphs.interpret import resolve
from graphs.ir import Op, OpGraph, Ref, Tensor, map_refs
from graphs.rules import Rule, rule_for

NUM_SHARDS = 2


@dataclass(frozen=True)
class Case:
    """A call to test, and what its rule should say.

    Attributes:
        splits: the factors that can be split, `+k` those of a sum.
        linear: the sets of operands in which it is linear, `02 12` for {0, 2} and {1, 2}.
        constants: operands of which torch has no gradient.
    """

    target: str
    args: tuple[Any, ...]
    splits: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    linear: str = ""
    constants: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.target}{[tuple(v.shape) for v in _tensors((self.args, self.kwargs))]}"


@dataclass(frozen=True)
class Call:
    """A case as an op of a graph, with its operands and results."""

    op: Op
    graph: OpGraph
    operands: tuple[torch.Tensor, ...]
    results: tuple[torch.Tensor, ...]
    rule: Rule


def record(case: Case) -> Call:
    """Run the call and look up its rule."""
    operands: dict[str, torch.Tensor] = {}

    def name(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            known = next((key for key, tensor in operands.items() if tensor is value), f"t{len(operands)}")
            operands[known] = value
            return Ref(known)
        if isinstance(value, (tuple, list)):
            return type(value)(name(item) for item in value)
        return value

    op = Op(
        "op",
        case.target,
        tuple(name(a) for a in case.args),
        {k: name(v) for k, v in case.kwargs.items()},
        (),
        "",
    )
    results = run(op, [operands[key] for key in op.inputs])
    outputs = tuple(f"r{index}" for index in range(len(results)))
    op = replace(op, outputs=outputs)
    values = {**operands, **dict(zip(outputs, results, strict=True))}
    tensors = {key: Tensor(key, tuple(value.shape), value.dtype, False, key) for key, value in values.items()}
    graph = OpGraph("call", tensors, (op,), (), (), tuple(operands), outputs, outputs, None, {})
    rule = rule_for(op, graph)
    assert rule is not None, f"{case} has no rule"
    return Call(op, graph, tuple(operands[key] for key in op.inputs), results, rule)


def run(op: Op, operands: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The op on other operands."""
    remaining = iter(operands)
    args, kwargs = map_refs((op.args, dict(op.kwargs)), lambda _: next(remaining))
    results = resolve(op.target)(*args, **kwargs)
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


# --- the meaning of a factor: it is one axis of the dimensions that hold it --------------------------------


def splittable(rule: Rule) -> list[str]:
    """Factors that can be split into `NUM_SHARDS` by the definitions of `Rule`."""
    return [
        factor for factor, size in rule.sizes.items() if size % NUM_SHARDS == 0 and _allowed(rule, factor)
    ]


def _allowed(rule: Rule, factor: str) -> bool:
    everywhere = all(any(factor in dim for dim in result) for result in rule.results)
    repeated = any(sum(factor in dim for dim in dims) > 1 for dims in (*rule.operands, *rule.results))
    return (
        factor not in rule.unsplittable
        and not repeated
        and (everywhere or factor in rule.reductions or factor in rule.whole)
    )


def shard(rule: Rule, side: str, index: int, tensor: torch.Tensor, factor: str, rank: int) -> torch.Tensor:
    """One rank's part of an operand or result."""
    return join(rule, side, index, [tensor], factor, lambda piece: [_chunk(piece, rank)])


def shards_of(call: Call, factor: str) -> list[list[torch.Tensor]]:
    """The operands of every rank."""
    return [
        [shard(call.rule, "operand", i, tensor, factor, rank) for i, tensor in enumerate(call.operands)]
        for rank in range(NUM_SHARDS)
    ]


def unshard(rule: Rule, side: str, index: int, parts: Sequence[torch.Tensor], factor: str) -> torch.Tensor:
    """The whole from the parts of all ranks."""
    return join(rule, side, index, parts, factor, lambda *pieces: list(pieces))


def join(
    rule: Rule,
    side: str,
    index: int,
    tensors: Sequence[torch.Tensor],
    factor: str,
    combine: Callable[..., list[torch.Tensor]],
) -> torch.Tensor:
    """Lay the axis of `factor` first, combine pieces along it, lay it back."""
    dims = (rule.operands if side == "operand" else rule.results)[index]
    held = [position for position, dim in enumerate(dims) if factor in dim]
    if not held:
        return tensors[0]
    (position,) = held
    sections = rule.sections.get((side, index, position))
    if sections is not None:
        scale = tensors[0].shape[position] / sum(sections)
        pieces = [t.split([int(part * scale) for part in sections], position) for t in tensors]
        moved = [[piece.movedim(position, 0) for piece in row] for row in zip(*pieces, strict=True)]
        return torch.cat([torch.cat(combine(*row)).movedim(0, position) for row in moved], position)
    names = dims[position]
    if len(names) == 1:
        return torch.cat(combine(*(t.movedim(position, 0) for t in tensors))).movedim(0, position)
    sizes = [rule.sizes[name] for name in names]
    place = names.index(factor)
    local = tensors[0].shape[position] * rule.sizes[factor] // prod(sizes)
    sizes[place] = local
    axis = position + place
    pulled = [t.unflatten(position, sizes).movedim(axis, 0) for t in tensors]
    return torch.cat(combine(*pulled)).movedim(0, axis).flatten(position, position + len(names) - 1)


def _chunk(piece: torch.Tensor, rank: int) -> torch.Tensor:
    return piece.chunk(NUM_SHARDS)[rank]


# --- what every rank runs ----------------------------------------------------------------------------------


def run_split(
    call: Call, factor: str, shards: Sequence[Sequence[torch.Tensor]]
) -> list[tuple[torch.Tensor, ...]]:
    """The results of every rank, whose operands are `shards[rank]`."""
    form = call.rule.implemented.get(factor)
    if form is not None:
        return FORMS[form](call, shards)
    return [run(localized(call, factor, operands), operands) for operands in shards]


def localized(call: Call, factor: str, operands: Sequence[torch.Tensor]) -> Op:
    """The op with its size arguments computed from local shapes."""
    op, rule = call.op, call.rule
    shape = list(shard(rule, "result", 0, call.results[0], factor, 0).shape)

    def with_arg(index: int, value: Any) -> Op:
        return replace(op, args=(*op.args[:index], value, *op.args[index + 1 :]))

    name = op.target.split(".")[1]
    if name in ("full", "zeros", "ones", "empty"):
        return with_arg(0, shape)
    if name in ("reshape", "expand", "new_zeros", "new_ones", "new_full"):
        return with_arg(1, shape)
    if name == "repeat":
        padded = [1] * (len(shape) - operands[0].dim()) + list(operands[0].shape)
        return with_arg(1, [out // size for out, size in zip(shape, padded, strict=True)])
    operand_dim = next((dim for dim, names in enumerate(rule.operands[0]) if factor in names), None)
    if operand_dim is not None:
        if (
            name in ("split", "split_with_sizes")
            and operand_dim == (op.args[2:] or (0,))[0] % operands[0].dim()
        ):
            sizes = op.args[1]
            return with_arg(
                1, sizes // 2 if isinstance(sizes, int) else [size // NUM_SHARDS for size in sizes]
            )
        if name == "slice" and operand_dim == op.args[1]:
            start = (op.args[2] or 0) // NUM_SHARDS
            return replace(op, args=(op.args[0], op.args[1], start, start + shape[operand_dim]))
        if name == "narrow" and operand_dim == op.args[1]:
            return replace(op, args=(*op.args[:2], op.args[2] // NUM_SHARDS, op.args[3] // NUM_SHARDS))
    if factor == "g" and name in ("conv1d", "conv2d"):
        return with_arg(6, op.args[6] // NUM_SHARDS)
    if factor == "g" and name == "group_norm":
        return with_arg(1, op.args[1] // NUM_SHARDS)
    return op


Form = Callable[[Call, Sequence[Sequence[torch.Tensor]]], list[tuple[torch.Tensor, ...]]]


def _mean(call: Call, shards: Sequence[Sequence[torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(result / NUM_SHARDS for result in run(call.op, operands)) for operands in shards]


def _lookup(call: Call, shards: Sequence[Sequence[torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
    found: list[tuple[torch.Tensor, ...]] = []
    for rank, (table, indices) in enumerate(shards):
        local = indices - rank * len(table)
        mine = (local >= 0) & (local < len(table))
        found.append((functional.embedding(local.where(mine, 0), table) * mine.unsqueeze(-1),))
    return found


def _loss_of_rows(call: Call, shards: Sequence[Sequence[torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
    count = sum((target != -100).sum() for _, target in shards)
    return [(functional.cross_entropy(logits, target, reduction="sum") / count,) for logits, target in shards]


def _loss_of_classes(call: Call, shards: Sequence[Sequence[torch.Tensor]]) -> list[tuple[torch.Tensor, ...]]:
    target = shards[0][1]
    normalizer = sum(logits.exp().sum(-1) for logits, _ in shards).log()
    picked = torch.zeros(())
    for rank, (logits, _) in enumerate(shards):
        local = target - rank * logits.shape[1]
        mine = (local >= 0) & (local < logits.shape[1])
        picked = picked + logits.gather(1, local.where(mine, 0).unsqueeze(1)).squeeze(1) * mine
    losses = (normalizer - picked).where(target != -100, 0)
    reduction = call.op.args[3] if len(call.op.args) > 3 else 1
    loss = losses.sum() / ((target != -100).sum() if reduction == 1 else 1)
    return [(loss,)] * NUM_SHARDS


def _joined_statistics(
    call: Call, shards: Sequence[Sequence[torch.Tensor]]
) -> list[tuple[torch.Tensor, ...]]:
    """Every rank normalizes by mean and variance of all rows."""
    rows = torch.cat([x for x, *_ in shards])
    shape = [-1] + [1] * (rows.dim() - 2)
    variance, mean = torch.var_mean(rows, [0, *range(2, rows.dim())], correction=0)
    found: list[tuple[torch.Tensor, ...]] = []
    for x, weight, bias in shards:
        normalized = (x - mean.view(shape)) / (variance + call.op.args[7]).sqrt().view(shape)
        found.append((normalized * weight.view(shape) + bias.view(shape),))
    return found


FORMS: dict[str, Form] = {
    "batch_norm_rows": _joined_statistics,
    "mean": _mean,
    "vocab_parallel_embedding": _lookup,
    "cross_entropy_rows": _loss_of_rows,
    "vocab_parallel_cross_entropy": _loss_of_classes,
}
