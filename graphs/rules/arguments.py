"""The arguments of an op by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from graphs.interpret import resolve
from graphs.ir import Op, refs_in
from graphs.rules.rule import Dim


@dataclass(frozen=True, slots=True)
class Arguments:
    """Every argument of the schema, defaults included, and where the tensor ones stand among the operands."""

    values: Mapping[str, Any]
    positions: Mapping[str, int]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def operand(self, name: str) -> int | None:
        """Index in `Op.inputs` of a tensor argument (of the first of a list), None where it is no tensor."""
        return self.positions.get(name)

    def in_order(self, dims: Mapping[str, Sequence[Dim]]) -> list[Sequence[Dim]]:
        """The entries of `dims` (by argument name) of arguments that are given, in operand order."""
        return [dims[name] for name in sorted(self.positions, key=self.positions.__getitem__)]

    def linear_in(self, *sets: Sequence[str]) -> tuple[frozenset[int], ...]:
        """`Rule.linear` from sets of argument names; names that are not given drop out."""
        found = (
            frozenset(self.positions[name] for name in names if name in self.positions) for names in sets
        )
        return tuple(dict.fromkeys(members for members in found if members))


def arguments(op: Op) -> Arguments:
    """The arguments of an op of a torch library. Raises `AttributeError` where the library is not loaded."""
    values = dict(_defaults(op.target))
    given = [*zip(values, op.args, strict=False), *op.kwargs.items()]
    positions: dict[str, int] = {}
    count = 0
    for name, value in given:
        values[name] = value
        tensors = len(refs_in(value))
        if tensors:
            positions[name] = count
        count += tensors
    return Arguments(values, positions)


@cache
def _defaults(target: str) -> Mapping[str, Any]:
    schema = resolve(target)._schema
    return {argument.name: argument.default_value for argument in schema.arguments}
