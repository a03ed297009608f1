"""torch's DTensor as a second opinion: may a call run on these placements, and what has its result?

The mesh has one axis of `NUM_SHARDS` ranks in a fake process group, and the shards have no data. A call is
run as a DTensor program, so DTensor decomposes composite ops in its own way. It *offers* a layout where
neither an operand nor anything in between has to be redistributed. Private modules of torch are used here
only.

A layout is written `S0 R -> P`: the placement of each operand, then of each result. `S1/3` is a strided
shard: a part of every third of dimension 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, _redistribute
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _MaskPartial, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from graphs.rules import Rule
from graphs.rules.arguments import arguments
from tests.graphs.rule_harness import NUM_SHARDS, Call, run, splittable

Placements = Sequence[Placement]

_AVERAGED = {"mean", "cross_entropy_rows"}
"""Our local forms of a mean divide by the whole count; DTensor's averages the local means."""


@contextmanager
def fake_mesh() -> Iterator[DeviceMesh]:
    """A mesh of which only rank 0 exists, this process; to redistribute on it fails."""
    module = "torch.distributed.tensor"
    dist.init_process_group("fake", rank=0, world_size=NUM_SHARDS, store=FakeStore())
    try:
        with (
            mock.patch(f"{module}._dispatch.redistribute_local_tensor", _mask_only),
            mock.patch(f"{module}._redistribute.redistribute_local_tensor", _mask_only),
        ):
            yield init_device_mesh("cpu", (NUM_SHARDS,))
    finally:
        dist.destroy_process_group()


# --- what our rule offers ----------------------------------------------------------------------------------


def ours(call: Call) -> dict[str, tuple[Placements, str] | None]:
    """Of every strategy (a factor, or `linear` and operands) the operands' placements and the written layout.

    None where no placement of torch's says it: a dimension cut into sections of different sizes.
    """
    rule = call.rule
    found: dict[str, tuple[Placements, str] | None] = {}
    for factor in splittable(rule):
        averaged = rule.implemented.get(factor) in _AVERAGED
        summed = Replicate() if factor in rule.whole else Partial("avg" if averaged else "sum")
        operands = [_placed(rule, "operand", i, factor, Replicate()) for i in range(len(rule.operands))]
        results = [_placed(rule, "result", i, factor, summed) for i in range(len(rule.results))]
        if None in (*operands, *results):
            found[factor] = None
        else:
            known = [placement for placement in operands if placement is not None]
            found[factor] = known, written(operands, results)
    for members in rule.linear:
        partial = [Partial() if i in members else Replicate() for i in range(len(rule.operands))]
        key = "linear" + "".join(map(str, sorted(members)))
        found[key] = partial, written(partial, [Partial()] * len(rule.results))
    return found


def _placed(rule: Rule, side: str, index: int, factor: str, absent: Placement) -> Placement | None:
    dims = (rule.operands if side == "operand" else rule.results)[index]
    for position, names in enumerate(dims):
        if factor not in names:
            continue
        sections = rule.sections.get((side, index, position))
        if sections is not None and len(set(sections)) > 1:
            return None
        parts = len(sections) if sections else prod(rule.sizes[name] for name in names[: names.index(factor)])
        return Shard(position) if parts == 1 else _StridedShard(position, split_factor=parts)
    return absent


def written(operands: Sequence[Placement | None], results: Sequence[Placement | None]) -> str:
    """A layout in letters."""
    return f"{' '.join(map(_letters, operands))} -> {' '.join(map(_letters, results))}"


def _letters(placement: Placement | None) -> str:
    if isinstance(placement, _StridedShard):
        return f"S{placement.dim}/{placement.split_factor}"
    if isinstance(placement, Shard):
        return f"S{placement.dim}"
    if isinstance(placement, Partial):
        summed = type(placement) in (Partial, _MaskPartial) and placement.reduce_op == "sum"
        return "P" if summed else f"P({placement.reduce_op})"
    return "R"


# --- what DTensor offers -----------------------------------------------------------------------------------


class Redistributed(Exception):
    """DTensor would have to move data first."""


def known(call: Call, mesh: DeviceMesh) -> bool:
    """DTensor can run this call at all, on whole operands."""
    return answer(call, mesh, [Replicate()] * len(call.operands)) is not None


def answer(call: Call, mesh: DeviceMesh, placements: Placements) -> str | None:
    """The layout with DTensor's placements of the results, None where it refuses or redistributes."""
    try:
        return written(placements, _run(call, mesh, placements))
    except (Redistributed, NotImplementedError, RuntimeError):
        return None  # that is how DTensor refuses


def theirs(call: Call, mesh: DeviceMesh) -> Iterator[str]:
    """Every layout that DTensor offers, of operands that are whole, evenly sharded or partial sums."""
    for placements in product(*(_choices(tensor) for tensor in call.operands)):
        named: dict[str, Placement] = {}
        same = all(named.setdefault(n, p) == p for n, p in zip(call.op.inputs, placements, strict=True))
        if same and any(placement != Replicate() for placement in placements):
            layout = answer(call, mesh, placements)
            if layout is not None:
                yield layout


def _choices(tensor: torch.Tensor) -> list[Placement]:
    even = [dim for dim, size in enumerate(tensor.shape) if size and size % NUM_SHARDS == 0]
    inexact = tensor.is_floating_point() or tensor.is_complex()
    return [Replicate(), *map(Shard, even), *([Partial()] if inexact else [])]


def _run(call: Call, mesh: DeviceMesh, placements: Placements) -> list[Placement]:
    operands = [_distributed(t, mesh, p) for t, p in zip(call.operands, placements, strict=True)]
    results = run(_kernel(call).op, operands)[: len(call.results)]
    return [result.placements[0] if isinstance(result, DTensor) else Replicate() for result in results]


def _distributed(tensor: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    local = list(tensor.shape)
    if isinstance(placement, Shard | _StridedShard):
        local[placement.dim] //= NUM_SHARDS
    meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
    spec = DTensorSpec(mesh, (placement,), tensor_meta=meta)
    return DTensor(whole.new_empty(local), spec, requires_grad=False)


def _mask_only(
    local: torch.Tensor, current: DTensorSpec, target: DTensorSpec, *args: Any, **kwargs: Any
) -> Any:
    """A vocabulary-parallel lookup masks its indices in the guise of a redistribution."""
    if isinstance(target.placements[0], _MaskPartial):
        return _REDISTRIBUTE(local, current, target, *args, **kwargs)
    raise Redistributed


_REDISTRIBUTE = _redistribute.redistribute_local_tensor


def _kernel(call: Call) -> Call:
    """Attention as an accelerator runs it, in one kernel; on a processor it would be taken to pieces."""
    if call.op.target != "aten.scaled_dot_product_attention.default" or call.operands[0].dim() != 4:
        return call
    causal, mask = (arguments(call.op)[name] for name in ("is_causal", "attn_mask"))
    if mask is None:
        args, name = (*call.op.args[:3], 0.0, causal), "flash"
    elif call.operands[3].dim() == 4:
        args, name = (*call.op.args[:4], True, 0.0, causal), "efficient"
    else:
        return call
    target = f"aten._scaled_dot_product_{name}_attention.default"
    return replace(call, op=replace(call.op, target=target, args=args, kwargs={}))
