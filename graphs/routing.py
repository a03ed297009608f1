"""Rows that a model puts into an order of their own, works on, and puts back: the routing of experts.

Dropless routing sorts the rows of a batch by expert, multiplies each run of rows with the matrix of its
expert, and undoes the sort. In between no element knows its sample by its place any more, so no dimension of
these tensors can be split by its extent. Yet each row is treated by itself, so ranks may each sort and send
back rows of their own. That is what is found out here, from the ops alone: starting at a sort of integers,
follow what is made of its two results, and see that

* rows are fetched by the sorting permutation, or one derived from it, from tensors in their first order,
* every op on them treats rows alike (its sharding rule has a factor for them) or is a grouped product, whose
  runs are counted from the sorted keys,
* they come back by the inverse permutation, or are added where they came from,
* nothing else reads a tensor in sorted order.

Where all of that holds, the ops carry it in `Op.rows`; where anything else happens, they carry nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from graphs import rules
from graphs.ir import Op, OpGraph, Ref, RowOrder

Kind = Literal["keys", "order", "inverse", "rows", "counts"]
"""What is known of a tensor made from a sort: its sorted keys; numbers of rows of a tensor in first order, in
sorted order; where in sorted order each row is; any values of rows in sorted order; how many rows there are
of each key."""


class Known(NamedTuple):
    """A tensor made from a sort; an "order" is one of `num_rows` rows."""

    kind: Kind
    num_rows: int


@dataclass(frozen=True)
class Step:
    """What an op does with rows: their order in each operand and result, and what becomes known of results
    that are not in first order."""

    operands: tuple[RowOrder | None, ...]
    results: tuple[Known | None, ...]

    @property
    def rows(self) -> tuple[RowOrder | None, ...]:
        """As `Op.rows` has it."""
        return (*self.operands, *("first" if each is None else _order(each) for each in self.results))


def with_routing(graph: OpGraph) -> OpGraph:
    """The graph with `Op.rows` of all ops between a sort of rows and its undoing."""
    found: dict[int, tuple[RowOrder | None, ...]] = {}
    for index, op in enumerate(graph.ops):
        if op.target == "aten.sort.default" and index not in found:
            found |= _routed(graph, index)
    ops = (replace(op, rows=found[index]) if index in found else op for index, op in enumerate(graph.ops))
    return replace(graph, ops=tuple(ops)) if found else graph


def _routed(graph: OpGraph, start: int) -> Mapping[int, tuple[RowOrder | None, ...]]:
    """The ops that work on the rows that `start` sorts; none where some op could tell rows apart."""
    sort = graph.ops[start]
    keys = graph.tensors[sort.inputs[0]]
    if len(keys.shape) != 1 or keys.dtype.is_floating_point or sort.outputs[1] not in graph.tensors:
        return {}
    known = dict(zip(sort.outputs, (Known("keys", 0), Known("order", keys.shape[0])), strict=True))
    found: dict[int, tuple[RowOrder | None, ...]] = {start: ("first", "own", "own")}
    comes_back = False
    for index in range(start + 1, len(graph.ops)):
        op = graph.ops[index]
        if known.keys().isdisjoint(op.inputs):
            continue
        step = _step(op, graph, known)
        if step is None:
            return {}
        comes_back |= None in step.results
        known |= {name: each for name, each in zip(op.outputs, step.results, strict=True) if each is not None}
        found[index] = step.rows
    return found if comes_back and known.keys().isdisjoint(graph.outputs) else {}


def _order(known: Known) -> RowOrder:
    return "counts" if known.kind == "counts" else "own"


def _step(op: Op, graph: OpGraph, known: Mapping[str, Known]) -> Step | None:
    """What an op does that reads some of the `known` tensors; None where that cannot be told."""
    kinds = [known[name].kind if name in known else None for name in op.inputs]
    operands = tuple(_order(known[name]) if name in known else None for name in op.inputs)
    first = known.get(op.inputs[0])
    name = op.target.split(".")[1]
    match name, kinds:
        case _, _ if set(kinds) <= {"counts", None}:
            return Step(operands, (Known("counts", 0),) * len(op.outputs))
        case "histc" | "bincount", ["keys"]:
            return Step(operands, (Known("counts", 0),))
        case "_grouped_mm" | "grouped_mm_fallback", ["rows", None, "counts"]:
            return Step(operands, (Known("rows", 0),))
        case "floor_divide", ["order"] if first is not None and _divides(op.args[1], first.num_rows):
            return Step(operands, (Known("order", first.num_rows // op.args[1]),))
        case "index", [None, ("order" | "keys") as kind] if _is_by_rows(op):
            if kind == "order" and known[op.inputs[1]].num_rows != graph.tensors[op.inputs[0]].shape[0]:
                return None
            return Step(("first" if kind == "order" else None, "own"), (Known("rows", 0),))
        case "index", [("rows" | "keys" | "order"), "inverse"] if _is_by_rows(op):
            return Step(operands, (None,))
        case "index_put", [_, "order", None] if _counts_up(op, graph):
            return Step(operands, (Known("inverse", 0),))
        case "index_add", [None, "order", "rows"] if op.args[1] == 0:
            placed = graph.tensors[op.inputs[0]].shape[0] == known[op.inputs[1]].num_rows
            return Step(("first", "own", "own"), (None,)) if placed else None
        case "to" | "_to_copy", ["keys"]:
            return Step(operands, (Known("keys", 0),))
    return _alike(op, graph, operands)


def _alike(op: Op, graph: OpGraph, operands: tuple[RowOrder | None, ...]) -> Step | None:
    """An op that treats the rows of its operands alike, by its sharding rule: along their first dimension,
    and that of its results."""
    rule = rules.rule_for(op, graph)
    if rule is None or "counts" in operands:
        return None
    heads = [dims[0] if dims else () for dims in (*rule.operands, *rule.results)]
    own = {head for head, order in zip(heads, operands, strict=False) if order is not None}
    own |= set(heads[len(operands) :])
    if len(own) != 1:
        return None
    (head,) = own
    cut = any(dim == 0 for _, _, dim in rule.sections)
    if len(head) != 1 or head[0] in rule.unsplittable | rule.implemented.keys() or cut:
        return None
    meets = any(
        head[0] in names
        for dims, order in zip(rule.operands, operands, strict=True)
        for names in (dims if order is None else dims[1:])
    )
    return None if meets else Step(operands, (Known("rows", 0),) * len(op.outputs))


def _divides(number: object, num_rows: int) -> bool:
    return isinstance(number, int) and number > 0 and num_rows % number == 0


def _is_by_rows(op: Op) -> bool:
    """Whether only the first dimension is indexed."""
    return len(op.args[1]) == 1


def _counts_up(op: Op, graph: OpGraph) -> bool:
    """Whether what is placed is 0, 1, 2, ..., so that the result is the inverse of the index."""
    placed = op.args[2]
    if not isinstance(placed, Ref) or len(op.args[1]) != 1 or op.args[3:] not in ((), (False,)):
        return False
    made = graph.producer.get(placed.name)
    (extent,) = graph.tensors[placed.name].shape or (0,)
    is_range = made is not None and graph.ops[made].target == "aten.arange.default"
    return is_range and graph.ops[made or 0].args == (extent,) == graph.tensors[op.inputs[0]].shape
