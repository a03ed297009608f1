"""Programs of the search at other depths: the plan's at full depth, and mixtures, whose blocks differ.

The search makes programs of a shallow model (`autopar.search.shallow`). Their strategies carry over by the
names of representative ops.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from autopar.localize import Assignment, localize
from autopar.plan import Parallelism
from autopar.search.effort import clocked
from autopar.search.local_programs import Program, ProgramKey
from autopar.search.mixed_assignment import mixed_assignment, op_blocks
from autopar.search.replicas import make_replica, strategy_keys
from autopar.search.shallow import Shallow, shallow
from graphs.ir import OpGraph

if TYPE_CHECKING:
    from autopar.search.programs import Programs


class OtherDepths:
    """The programs of one model at other depths than the search's."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.effort = programs.effort
        self._mixed: dict[ProgramKey, Program | None] = {}

    @clocked("local programs")
    def finished(self, program: Program) -> Program:
        """The same program at full depth."""
        if not self.programs.shallow.repeats:
            return program
        found = self._carried(program.key, Shallow(self.programs.capture, {}))
        assert found is not None, "it was made at another depth"
        return found

    @clocked("local programs")
    def mixed(self, p: Parallelism, price_level: int, levels: tuple[int, ...]) -> Program | None:
        """The program of a candidate in which every block has its own of the `MEMORY_PRICES`, and what is
        outside of blocks that of `price_level`; None where blocks would not understand each other."""
        key = self.programs.key(p, price_level)._replace(levels=levels)
        if key not in self._mixed:
            self.effort.solved("local programs")
            capture, short = self.programs.capture, self.programs.shallow
            blocks = capture.graph.blocks
            borders = frozenset(
                block.path
                for block, pair in zip(blocks[1:], pairwise(levels), strict=True)
                if len({*pair}) > 1
            )
            model = shallow(capture, borders) if short.repeats else short
            self._mixed[key] = self._carried(key, model)
        return self._mixed[key]

    def _carried(self, key: ProgramKey, model: Shallow) -> Program | None:
        """The strategies that the search has chosen, at another depth; None where those of different blocks
        do not go together."""
        whole = model.capture.at(key.microbatch_size * key.data_size)
        short = self.programs.replica_of(key)
        dp = short.assignments.get("dp")

        def split(outer: OpGraph, size: int) -> Assignment:
            return deepened(short.assignments["cp"], short.outer, outer)

        replica = make_replica(whole, None if dp is None else deepened(dp, short.whole, whole), key.cp, split)
        local, keys, solution = replica.local, dict(replica.keys), None
        if key.tp > 1:
            assignment = self._assignment(key, whole, short.local.graph, local.graph)
            if assignment is None:
                return None
            keys["tp"] = strategy_keys(local.graph, assignment)
            solution = self.programs.made(key._replace(levels=())).solution
            assert solution is not None, "there is a tensor axis"
            solution = replace(solution, assignment=assignment)
            local = localize(local, assignment)
        return Program(key, self.programs.chain(whole, local, key, model.repeats), solution, keys)

    def _assignment(
        self, key: ProgramKey, whole: OpGraph, short: OpGraph, local: OpGraph
    ) -> Assignment | None:
        """What the programs of the search, local graphs of which are `short`, say of `local`, made of
        `whole`."""
        by_level = {}
        for level in {key.price_level, *key.levels}:
            solution = self.programs.made(key._replace(price_level=level, levels=())).solution
            assert solution is not None, "there is a tensor axis"
            by_level[level] = deepened(solution.assignment, short, local)
        if not key.levels:
            return by_level[key.price_level]
        paths = (block.path for block in self.programs.capture.graph.blocks)
        by_path = dict(zip(paths, key.levels, strict=True))
        return mixed_assignment(local, by_level, op_blocks(local, whole), by_path, key.price_level)


def deepened(assignment: Assignment, graph: OpGraph, full: OpGraph) -> Assignment:
    """The assignment of a shallow graph, carried over to the full one by the names of representative ops."""
    chosen = {op.name: strategy for op, strategy in zip(graph.ops, assignment.choice, strict=True)}
    choice = tuple(chosen[full.ops[index].name] for index in full.representative)
    position = {op.name: index for index, op in enumerate(graph.ops)}
    sources = dict(assignment.sources)
    for parameter in full.parameters:
        readers = full.consumers[parameter.tensor]
        if parameter.tensor not in sources and readers:
            operand = full.ops[readers[0]].inputs.index(parameter.tensor)
            alike = graph.ops[position[full.ops[full.representative[readers[0]]].name]]
            sources[parameter.tensor] = assignment.sources[alike.inputs[operand]]
    return replace(assignment, choice=choice, sources=sources)
