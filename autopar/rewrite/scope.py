"""The body of one `forward`: statements, what is folded into what, and the names of the variables.

Statements come in the order of the graph. A value that is read once, by a light expression, is written where it is
read. A variable is named after what made it, and a name is used again once its last reader is past, so that
`x = x + self.mlp(self.norm(x))` comes out as a person would write it.
"""

from __future__ import annotations

import keyword
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from autopar.rewrite.expressions import Expression
from graphs.ir import Op, OpGraph

FOLD_WEIGHT = 5
"""The most operations that one expression holds."""

Render = Callable[[Mapping[str, Expression]], Expression]


@dataclass(frozen=True)
class Statement:
    """One step: it makes `targets` from `reads`.

    `weight` counts operations; `foldable` says whether the value may be written inside its only reader, and `absorbs`
    whether values may be written inside this one. `loop` is the header of a `for` whose body this is, `carried` the
    tensor that goes round in it.
    """

    targets: tuple[str, ...]
    reads: tuple[str, ...]
    render: Render
    base: tuple[str, ...]
    weight: int = 1
    foldable: bool = True
    absorbs: bool = True
    comment: str = ""
    loop: str = ""
    carried: str = ""


@dataclass
class Scope:
    """The statements of one function, with the tensors that come in and go out."""

    arguments: Mapping[str, str]
    constants: Mapping[str, str]
    results: tuple[str, ...]
    statements: list[Statement] = field(default_factory=list)
    reserved: frozenset[str] = frozenset()

    def lines(self) -> list[str]:
        """Source lines of the body, the `return` included."""
        statements = self._folded()
        final = statements[-1] if statements else None
        if final is not None and final.targets == self.results and not final.loop and not final.comment:
            statements = statements[:-1]
        else:
            final = None
        last_use = self._last_uses(statements, [final] if final is not None else [])
        names = dict(self.arguments)
        values: dict[str, Expression] = {name: Expression(text) for name, text in self.constants.items()}
        values |= {tensor: Expression(name) for tensor, name in names.items()}
        lines: list[str] = []
        for index, statement in enumerate(statements):
            if statement.carried:
                lines += self._enter_loop(statement, index, names, values, last_use)
            expression = statement.render(values)
            free = {tensor for tensor in names if last_use.get(tensor, -1) <= index}
            taken = {name for tensor, name in names.items() if tensor not in free}
            for target, base in zip(statement.targets, statement.base, strict=True):
                if statement.carried:
                    names[target] = values[statement.carried].text
                else:
                    names[target] = _fresh(base, taken | self.reserved)
                taken.add(names[target])
            for target in statement.targets:
                values[target] = Expression(names[target])
            left = ", ".join(names[target] for target in statement.targets)
            comment = f"  # {statement.comment}" if statement.comment else ""
            if statement.loop:
                lines += [statement.loop, f"    {left} = {expression.text}{comment}"]
            else:
                lines.append(f"{left} = {expression.text}{comment}")
        if final is not None:
            return [*lines, f"return {final.render(values).text}"]
        return [*lines, f"return {', '.join(values[name].text for name in self.results)}"]

    def _enter_loop(
        self,
        statement: Statement,
        index: int,
        names: dict[str, str],
        values: dict[str, Expression],
        last_use: Mapping[str, int],
    ) -> list[str]:
        """Give the carried value a variable of its own where the value from before the loop is read again later."""
        carried = statement.carried
        if carried in names and last_use.get(carried, -1) <= index:
            return []
        taken = {name for tensor, name in names.items() if last_use.get(tensor, -1) > index}
        name = _fresh(statement.base[0], taken | self.reserved)
        line = f"{name} = {values[carried].text}"
        values[carried] = Expression(name)
        return [line]

    def _folded(self) -> list[Statement]:
        """Statements with every light value that is read once written into its reader."""
        reads = Counter(name for statement in self.statements for name in statement.reads)
        reads.update(self.results)
        pending: dict[str, Statement] = {}
        kept: list[Statement] = []
        for statement in self.statements:
            inner = {name: pending[name] for name in statement.reads if name in pending}
            weight = statement.weight + sum(each.weight for each in inner.values())
            if inner and (not statement.absorbs or weight > FOLD_WEIGHT):
                kept += _in_order(inner, self.statements)
                for name in inner:
                    del pending[name]
                inner, weight = {}, statement.weight
            merged = _merge(statement, inner, weight) if inner else statement
            for name in inner:
                del pending[name]
            only = statement.targets[0] if len(statement.targets) == 1 else None
            if only is not None and statement.foldable and reads[only] == 1 and only not in self.results:
                pending[only] = merged
            else:
                kept.append(merged)
        assert not pending, f"values that nothing reads: {sorted(pending)}"
        return kept

    def _last_uses(self, statements: Sequence[Statement], unwritten: Sequence[Statement]) -> dict[str, int]:
        last = {name: len(statements) for name in self.results}
        for index, statement in enumerate((*statements, *unwritten)):
            for name in statement.reads:
                last.setdefault(name, index)
                last[name] = max(last[name], index)
        return last


def _in_order(inner: Mapping[str, Statement], statements: Sequence[Statement]) -> list[Statement]:
    order = {target: index for index, statement in enumerate(statements) for target in statement.targets}
    return [inner[name] for name in sorted(inner, key=order.__getitem__)]


def _merge(statement: Statement, inner: Mapping[str, Statement], weight: int) -> Statement:
    def render(values: Mapping[str, Expression]) -> Expression:
        written = {name: each.render(values) for name, each in inner.items()}
        return statement.render({**values, **written})

    reads = tuple(
        read for name in statement.reads for read in (inner[name].reads if name in inner else (name,))
    )
    base = statement.base
    if len(inner) == 1 and statement.base == ("",):
        base = next(iter(inner.values())).base
    return Statement(
        statement.targets,
        reads,
        render,
        base,
        weight,
        statement.foldable,
        statement.absorbs,
        statement.comment,
        statement.loop,
        statement.carried,
    )


def _fresh(base: str, taken: set[str] | frozenset[str]) -> str:
    base = base or "x"
    if keyword.iskeyword(base):
        base += "_"
    name, number = base, 2
    while name in taken:
        name = f"{base}_{number}"
        number += 1
    return name


PASSING = frozenset(
    {"to", "_to_copy", "reshape", "transpose", "contiguous", "unsqueeze", "squeeze", "expand", "clone", "permute"}
    | {"slice", "dropout", "detach", "select"}
)
"""Ops whose result is still called what its operand is."""


class Names:
    """What to call a tensor, before numbers make it unique. `given` names come first: arguments, what a loop carries."""

    def __init__(self, graph: OpGraph, ops: Sequence[Op], given: Mapping[str, str]) -> None:
        self.graph = graph
        self.maker = {name: op for op in ops for name in op.outputs}
        self.found = dict(given)

    def of(self, tensor: str) -> str:
        """The name of a tensor."""
        if tensor not in self.found:
            self.found[tensor] = self._find(tensor)
        return self.found[tensor]

    def _find(self, tensor: str) -> str:
        op = self.maker.get(tensor)
        if op is None:
            return tensor.rsplit(".", 1)[-1]
        name = op.target.split(".")[1]
        leaf = op.module.rpartition(".")[2]
        if op.target == "module.call" or name in _WEIGHTED:
            return leaf if leaf.isidentifier() else "x"
        if name in _SPOKEN:
            return _SPOKEN[name]
        operands = [read for read in op.inputs if read not in self.graph.parameter_tensors]
        if operands and (name in PASSING or op.target.startswith("autopar.")):
            inner = self.of(operands[0])
            return f"{inner}_full" if name.startswith("all_gather") else inner
        shape = self.graph.tensors[tensor].shape
        alike = [read for read in operands if self.graph.tensors[read].shape == shape]
        if name in _ARITHMETIC and alike:
            return "x" if any(self.of(read) == "x" for read in alike) else self.of(alike[0])
        return name.strip("_")


_WEIGHTED = frozenset({"linear", "mm", "matmul", "embedding", "layer_norm", "conv2d", "conv1d"})
_ARITHMETIC = frozenset({"add", "mul", "sub", "div"})
_SPOKEN = {
    "scaled_dot_product_attention": "attention",
    "cross_entropy_loss": "loss",
    "cross_entropy": "loss",
    "constant_pad_nd": "padded",
    "arange": "positions",
}
