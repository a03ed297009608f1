"""Which calls of a class's children are one loop over a container."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from autopar.rewrite.tree import Node
from graphs.ir import Op, OpGraph


class Call(Protocol):
    """The borders of a child: the tensors it takes and gives."""

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def outputs(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class LoopFinder:
    """Finds loops among the children of one class.

    `calls` are the borders of the children by path; `readers` the ops of the stage that read each tensor;
    `results` what the class returns. `always` are the paths of the repeated blocks of a pipeline stage: of
    these even a single one is a loop, so that stages with more layers are the same class. `recomputed` are
    blocks that are told what to keep: what is alike but for that has no part in their loop.
    """

    graph: OpGraph
    node: Node
    calls: Mapping[str, Call]
    readers: Mapping[str, Sequence[str]]
    results: Collection[str]
    always: Collection[str]
    recomputed: Collection[str]
    held: Collection[str]

    def run(self, start: int) -> list[Node]:
        """The longest run of sibling calls from item `start` that hand one activation from each to the
        next."""
        first = self.node.items[start]
        assert isinstance(first, Node)
        found = [first]
        for item in self.node.items[start + 1 :]:
            if not isinstance(item, Node) or not self._continues(found[-1], item, first):
                break
            found.append(item)
        return found

    def is_loop(self, run: Sequence[Node]) -> bool:
        """Whether a run is a loop over all members of a container."""
        calls = (item for item in self.node.items if isinstance(item, Node))
        siblings = sum(item.container == run[0].container for item in calls)
        if not run[0].attribute.isdigit() or siblings != len(run) or self._has_other_members(run):
            return False
        if len(run) > 1:
            return True
        call = self.calls[run[0].path]
        return run[0].path in self.always and len(call.outputs) == 1 and len(self._activations(call)) == 1

    def _has_other_members(self, run: Sequence[Node]) -> bool:
        """Whether the container also holds what is no call of the run, such as a layer written in place."""
        inside = tuple(f"{node.path}." for node in run)
        container = f"{run[0].container}."
        return any(path.startswith(container) and not path.startswith(inside) for path in self.held)

    def carried(self, run: Sequence[Node]) -> str:
        """The tensor that goes into a loop and round in it."""
        first = self.calls[run[0].path]
        if len(run) == 1:
            return self._activations(first)[0]
        return first.inputs[self.calls[run[1].path].inputs.index(first.outputs[0])]

    def _activations(self, call: Call) -> list[str]:
        return [name for name in call.inputs if self.graph.tensors[name].requires_grad]

    def _continues(self, before: Node, after: Node, first: Node) -> bool:
        """Whether `after` does to the one result of `before` what `first` did to what the run began with."""
        if after.container != first.container or not (
            first.attribute.isdigit() and after.attribute.isdigit()
        ):
            return False
        if (after.path in self.recomputed) is not (first.path in self.recomputed):
            return False
        if int(after.attribute) != int(before.attribute) + 1:
            return False
        previous, call, leader = (self.calls[node.path] for node in (before, after, first))
        if len(previous.outputs) != 1 or len(call.outputs) != 1 or len(call.inputs) != len(leader.inputs):
            return False
        made = previous.outputs[0]
        if made in self.results or call.inputs.count(made) != 1 or self._read_elsewhere(made, after.ops()):
            return False
        place = call.inputs.index(made)
        others = (*call.inputs[:place], *call.inputs[place + 1 :])
        constant = (*leader.inputs[:place], *leader.inputs[place + 1 :])
        return others == constant and leader.inputs[place] not in others

    def _read_elsewhere(self, tensor: str, ops: Iterable[Op]) -> bool:
        inside = {op.name for op in ops}
        return any(reader not in inside for reader in self.readers[tensor])
