"""Where pipeline stages must begin, and where they may not: pins on modules as numbers of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from autopar.errors import PinConflictError
from autopar.search.module_patterns import covering, covers, nearest
from autopar.search.pin_values import together
from autopar.search.units import unit_starts
from graphs.ir import OpGraph

if TYPE_CHECKING:
    from autopar.search.pins import Pins


class HasModules(Protocol):
    """A unit, as far as pins know it."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that its ops belong to."""
        ...


@dataclass(frozen=True, slots=True)
class NamedUnit:
    """The names of a unit; a chain whose repeated blocks stand for one another has them not."""

    modules: tuple[str, ...]


def named_units(graph: OpGraph) -> tuple[NamedUnit, ...]:
    """The units of the chain of a graph, at full depth."""
    block_at = {block.start: block.path for block in graph.blocks}
    found = []
    for start, stop in pairwise((*unit_starts(graph), len(graph.ops))):
        path = block_at.get(start)
        modules = dict.fromkeys(op.module for op in graph.ops[start:stop])
        found.append(NamedUnit(tuple(modules) if path is None else (path,)))
    return tuple(found)


def must_cut(pins: Pins, units: Sequence[HasModules]) -> tuple[int, ...]:
    """The units with which a stage must begin, ascending; the first unit, which always does, left out.

    Raises PinConflictError for a module with which no unit begins, and where it must stay with what is before
    it.
    """
    found: dict[int, str] = {}
    for pattern in pins.cut_before:
        first: dict[str, int] = {}
        for index, unit in enumerate(units):
            for module in unit.modules:
                path = covering(pattern, module)
                if path is not None:
                    first.setdefault(path, index)
        if not first:
            known = (module for unit in units for module in unit.modules)
            raise PinConflictError(f"cut_before {pattern}: no stage can begin there{nearest(pattern, known)}")
        found.update((index, path) for path, index in first.items() if index)
    for index, culprit in _kept_together(pins, units).items():
        if index in found:
            raise PinConflictError(f"cut_before {found[index]} would cut keep_together {culprit} apart")
    return tuple(sorted(found))


def may_cut(pins: Pins, units: Sequence[HasModules]) -> tuple[int, ...]:
    """The units with which a stage may begin, ascending, the first left out."""
    kept = _kept_together(pins, units)
    return tuple(index for index in range(1, len(units)) if index not in kept)


def num_stages(pins: Pins, units: Sequence[HasModules]) -> tuple[int, int]:
    """The fewest and the most stages that the pins leave.

    Raises PinConflictError where a pinned pipeline has fewer or more.
    """
    fewest, most = len(must_cut(pins, units)) + 1, len(may_cut(pins, units)) + 1
    pipeline = f"pp={pins.pp}"
    if pins.num_virtual_stages is not None:
        pipeline += f" with num_virtual_stages={pins.num_virtual_stages}"
    asked = (pins.pp or 1) * (pins.num_virtual_stages or 1)
    if asked > most:
        kept = f"; keep_together {', '.join(pins.keep_together)} forbids others" if pins.keep_together else ""
        raise PinConflictError(
            f"{pipeline} cuts the model into {asked} stages, but it has {most} pieces{kept}"
        )
    if pins.pp is not None and pins.num_virtual_stages is not None and asked < fewest:
        raise PinConflictError(
            f"cut_before {', '.join(pins.cut_before)} needs at least {fewest} stages, but {pipeline}"
        )
    return fewest, most


def _kept_together(pins: Pins, units: Sequence[HasModules]) -> dict[int, str]:
    """The units with which no stage may begin, each with the pin that says so."""
    found: dict[int, str] = {}
    for paths in pins.keep_together:
        patterns = together(paths)
        inside = [
            index
            for index, unit in enumerate(units)
            if any(covers(pattern, module) for pattern in patterns for module in unit.modules)
        ]
        if inside:
            found.update(dict.fromkeys(range(inside[0] + 1, inside[-1] + 1), paths))
    return found
