"""What pins leave of the strategies on a mesh axis: a rule for the operator layer's problem.

A parameter is stored as the ops that read it ask (`autopar.strategies.stored_state`), so a placement is
pinned by leaving every reader only the strategies that ask it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from autopar.errors import PinConflictError
from autopar.placements import Shard
from autopar.search.axis_problem import Custom
from autopar.search.pin_placement import PinnedPlacement
from autopar.strategies import Conversion, Strategy
from graphs.ir import Op, OpGraph
from hardware_db.errors import did_you_mean

if TYPE_CHECKING:
    from autopar.search.pins import Pins


def rule_of(pins: Pins, graph: OpGraph, axis: str) -> Custom | None:
    """What the pinned placements leave on an axis; None where there are none. Sequence parallelism is no
    matter of placements, but of `autopar.search.pinned.RegionRule`."""
    placements = placements_of(pins, axis)
    if not placements:
        return None
    size = getattr(pins, axis, None)
    return PlacementRule(graph, placements, "" if size is None else f"{axis}={size}")


def placements_of(pins: Pins, axis: str) -> tuple[PinnedPlacement, ...]:
    """The placements that are pinned on an axis, in their order."""
    return tuple(
        PinnedPlacement.parse(path, axis, by_axis[axis])
        for path, by_axis in pins.placements.items()
        if axis in by_axis
    )


@dataclass(frozen=True)
class PlacementRule:
    """Strategies under which parameters lie as pinned. `degree`, such as `tp=8`, is for messages."""

    graph: OpGraph
    placements: tuple[PinnedPlacement, ...]
    degree: str = ""

    def admitted(self, op: Op, offered: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
        """Raises PinConflictError where the pins leave an op nothing to do."""
        left = offered
        applied: dict[str, None] = {}
        for pin, position in self._demands(op):
            kept = tuple(strategy for strategy in left if _agrees(pin, position, strategy))
            applied[str(pin)] = None
            if not kept:
                raise PinConflictError(self._message(op, offered, pin, list(applied)))
            left = kept
        return left

    def admits_conversion(self, how: Conversion) -> bool:
        """Placements of parameters say nothing of what moves between ops."""
        return True

    def _demands(self, op: Op) -> list[tuple[PinnedPlacement, int | None]]:
        """The pins that concern an op, each with the operand that it is about, or None for the op itself. Of
        those that ask something of one operand, the last."""
        found: dict[tuple[int | None, str], tuple[PinnedPlacement, int | None]] = {}
        for pin in self.placements:
            for position in self._concerned[pin].get(op.name, ()):
                found[position, pin.text if pin.is_forbidden else ""] = (pin, position)
        return list(found.values())

    @cached_property
    def _concerned(self) -> Mapping[PinnedPlacement, Mapping[str, tuple[int | None, ...]]]:
        """Per pin, the operands that it concerns, by op."""
        return {pin: _concerned(pin, self.graph) for pin in self.placements}

    def _message(
        self, op: Op, offered: tuple[Strategy, ...], pin: PinnedPlacement, applied: list[str]
    ) -> str:
        culprits = [self.degree, *applied] if self.degree else applied
        verb = "leaves" if len(culprits) == 1 else "leave"
        weights = [index for index, name in enumerate(op.inputs) if name in self.graph.parameter_tensors]
        ways = {
            strategy.key: ", ".join(
                f"{self.graph.parameter_tensors[op.inputs[index]].name} {strategy.operands[index].value}"
                for index in weights
            )
            for strategy in offered
        }
        shown = "; ".join(f"{key} ({lies})" if lies else key for key, lies in ways.items())
        meant = did_you_mean(pin.key, ways) if pin.placement is None else ""
        return (
            f"{' and '.join(culprits)} {verb} no strategy for {op.name} ({op.target}) of "
            f"{op.module or 'the root'}, which on {pin.axis} may use: {shown}{meant}"
        )


def _agrees(pin: PinnedPlacement, position: int | None, strategy: Strategy) -> bool:
    if position is None or pin.placement is None:
        return pin.holds_for_key(strategy.key)
    return pin.holds_for(strategy.operands[position].value)


def _concerned(pin: PinnedPlacement, graph: OpGraph) -> Mapping[str, tuple[int | None, ...]]:
    """The ops that read parameters which the pin covers, with their operands; for a strategy key of a module
    without parameters all its ops."""
    covered = covered_parameters(pin, graph)
    if not covered and pin.placement is None:
        return {op.name: (None,) for op in graph.ops if pin.covers(op.module)}
    return {
        op.name: positions
        for op in graph.ops
        if (positions := tuple(index for index, name in enumerate(op.inputs) if name in covered))
    }


def covered_parameters(pin: PinnedPlacement, graph: OpGraph) -> frozenset[str]:
    """The tensors of the parameters that a pin is about: of a module, those that have the dimension."""
    found = set()
    for parameter in graph.parameters:
        num_dims = len(graph.tensors[parameter.tensor].shape)
        has_dim = not isinstance(pin.placement, Shard) or pin.placement.dim < num_dims
        if has_dim and pin.covers(parameter.name, *parameter.aliases):
            found.add(parameter.tensor)
    return frozenset(found)
