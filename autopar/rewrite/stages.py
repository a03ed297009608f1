"""Cut a local graph into pipeline stages.

A stage has the ops from its first one up to the next stage's. What it needs of earlier stages it receives,
and passes on what later ones need, so a skip connection may jump over any number of stages. What follows from
the batch alone (masks, rotary angles, positions) is not sent: every stage that needs it computes it again,
unless random numbers are in it, which each would draw anew. Nor are views and shards of parameters: a stage
that reads them has the parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from autopar.errors import RewriteError
from autopar.op_kinds import is_conversion, kind_of
from autopar.rewrite.draws import is_random
from graphs.ir import Op, OpGraph


@dataclass(frozen=True)
class Stage:
    """The ops of one stage, and its borders.

    `receives` and `sends` are activations from the stage before and to the stage after, in order; `batch` the
    model inputs it reads. The last stage sends what the program returns: the loss.
    """

    index: int
    num_stages: int
    ops: tuple[Op, ...]
    receives: tuple[str, ...]
    sends: tuple[str, ...]
    batch: tuple[str, ...]

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    @property
    def kind(self) -> str:
        """What its class is called after: nothing where there is one stage."""
        if self.num_stages == 1:
            return ""
        return "FirstStage" if self.is_first else "LastStage" if self.is_last else "MiddleStage"


def cut(graph: OpGraph, first_ops: Sequence[str], results: Sequence[str]) -> tuple[Stage, ...]:
    """Cut `graph` before each op named in `first_ops` but the first; `results` are what the last stage
    returns.
    """
    position = {op.name: index for index, op in enumerate(graph.ops)}
    starts = [0, *(position[name] for name in first_ops[1:]), len(graph.ops)]
    sent = _dependent(graph) - _parameter_forms(graph)
    inner = (_live(graph, start, results, sent) for start in starts[1:-1])
    borders = [(), *inner, tuple(results)]
    for index, (start, border) in enumerate(zip(starts[1:], borders[1:], strict=True), 1):
        if not any(graph.tensors[name].requires_grad for name in border):
            op = graph.ops[start]
            raise RewriteError(
                f"stage {index} of {len(starts) - 1} would train nothing: no value before {op.name} "
                f"({op.target}, module {op.module or 'root'}), where stage {index + 1} begins, has a "
                "gradient; let it begin later, or use fewer stages"
            )
    _check_rows_of_experts(graph, starts, borders)
    stages = []
    num_stages = len(starts) - 1
    for index in range(num_stages):
        receives, sends = borders[index], borders[index + 1]
        ops = _needed(graph, starts[index], starts[index + 1], receives, sends)
        read = dict.fromkeys(name for op in ops for name in op.inputs)
        batch = tuple(name for name in graph.inputs if name in read)
        stages.append(Stage(index, num_stages, ops, receives, sends, batch))
    return tuple(stages)


def _check_rows_of_experts(graph: OpGraph, starts: Sequence[int], borders: Sequence[tuple[str, ...]]) -> None:
    """Raises RewriteError where a stage would begin amid experts: it could not receive what they work on."""
    found: set[str] = set()
    for op in graph.ops:
        if op.target == "autopar.to_experts" or (
            op.target != "autopar.from_experts" and not found.isdisjoint(op.inputs)
        ):
            found.update(op.outputs)
    for index, border in enumerate(borders[1:-1], 1):
        if amid := found.intersection(border):
            op, maker = graph.ops[starts[index]], graph.ops[graph.producer[min(amid)]]
            raise RewriteError(
                f"stage {index + 1} of {len(borders) - 1} would begin with {op.name} ({op.target}, module "
                f"{op.module or 'root'}), amid experts: how many rows a rank has of {maker.name}, which it "
                f"would receive, is known only while they run; let it begin outside of {maker.module}"
            )


def _dependent(graph: OpGraph) -> frozenset[str]:
    """What follows from parameters, values with a gradient and others, such as the experts that a router
    chose, or from random numbers."""
    found = set(graph.parameter_tensors)
    for op in graph.ops:
        if is_random(op) or not found.isdisjoint(op.inputs):
            found.update(op.outputs)
    return frozenset(found)


def _parameter_forms(graph: OpGraph) -> frozenset[str]:
    """Views of parameters, and parameters in another state than the one they lie in."""
    found: set[str] = set()
    for op in graph.ops:
        is_form = is_conversion(op) or kind_of(op, graph.tensors) == "view"
        if is_form and op.inputs and found.union(graph.parameter_tensors).issuperset(op.inputs):
            found.update(op.outputs)
    return frozenset(found)


def _live(graph: OpGraph, start: int, results: Iterable[str], sent: Collection[str]) -> tuple[str, ...]:
    """Of the values in `sent`, those made before op `start` and needed from there on, in the order they are
    made."""
    wanted = set(results)
    made = (name for op in graph.ops[:start] for name in op.outputs if name in sent)
    return tuple(
        name for name in made if name in wanted or any(reader >= start for reader in graph.consumers[name])
    )


def _needed(
    graph: OpGraph, start: int, stop: int, receives: Sequence[str], sends: Sequence[str]
) -> tuple[Op, ...]:
    """Ops `[start, stop)` that lead to what the stage sends, and those before that these need: they follow
    from the batch alone, or from a parameter."""
    wanted = set(sends) - set(receives)
    needed: list[Op] = []
    for index in range(stop - 1, -1, -1):
        op = graph.ops[index]
        if not wanted.intersection(op.outputs):
            continue
        needed.append(op)
        wanted.update(name for name in op.inputs if name not in receives)
    return tuple(reversed(needed))
