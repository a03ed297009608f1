"""The body of one `forward`: statements, what is folded into what, and the names of the variables.

Statements come in the order of the graph. A value that is read once, by a light expression, is written where
it is read. A variable is named after what made it, and a name is used again once its last reader is past, so
that `x = x + self.mlp(self.norm(x))` comes out as a person would write it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autopar.rewrite.expressions import Expression
from autopar.rewrite.naming import RESERVED, fresh
from autopar.rewrite.typed_result import with_typed_result

FOLD_WEIGHT = 5
"""The most operations that one expression holds."""

LINE_LENGTH = 98
"""Of a statement with its comment: what is left of 110 columns inside a method."""

Render = Callable[[Mapping[str, Expression]], Expression]


@dataclass(frozen=True)
class Statement:
    """One step: it makes `targets` from `reads`.

    `weight` counts operations; `foldable` says whether the value may be written inside its only reader, and
    `absorbs` whether values may be written inside this one. `loop` is the header of a `for` whose body this
    is, `carried` the tensor that goes round in it.
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

    def lines(self) -> list[str]:
        """Source lines of the body, the `return` included."""
        statements = self._folded()
        returned = [each for each in statements[-1:] if self._is_returned(each)]
        statements = statements[: len(statements) - len(returned)]
        last_use = self._last_uses(statements, returned)
        names = dict(self.arguments)
        values = {tensor: Expression(text) for tensor, text in {**self.constants, **names}.items()}
        lines: list[str] = []
        for index, statement in enumerate(statements):
            taken = {name for tensor, name in names.items() if last_use.get(tensor, -1) > index} | RESERVED
            if statement.carried:
                # The variable that goes round must not be one whose value from before the loop is read again.
                before = values[statement.carried].text
                is_free = statement.carried in names and last_use.get(statement.carried, -1) <= index
                variables: tuple[str, ...] = (before if is_free else fresh(statement.base[0], taken),)
                lines += [] if is_free else [f"{variables[0]} = {before}"]
                expression = statement.render({**values, statement.carried: Expression(variables[0])})
            else:
                variables = _fresh_names(statement.base, taken)
                expression = statement.render(values)
            names |= zip(statement.targets, variables, strict=True)
            values |= {target: Expression(names[target]) for target in statement.targets}
            lines += _written(statement, variables, expression)
        results = [each.render(values).text for each in returned] or [
            values[name].text for name in self.results
        ]
        if len(results) > 1:
            return [*lines, f"return {', '.join(results)}"]
        base = returned[0].base[0] if returned else ""
        return with_typed_result(lines, results[0], base, self.arguments.values())

    def _is_returned(self, last: Statement) -> bool:
        """Whether the last statement is an expression that stands in the `return`."""
        return last.targets == self.results and not last.loop and not last.comment

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
    return replace(statement, reads=reads, render=render, weight=weight)


def _fresh_names(bases: Sequence[str], taken: Collection[str]) -> tuple[str, ...]:
    names: list[str] = []
    for base in bases:
        names.append(fresh(base, {*taken, *names}))
    return tuple(names)


def _written(statement: Statement, targets: Sequence[str], expression: Expression) -> list[str]:
    """An assignment with its comment: behind it, or before it where the line would be too long."""
    indent = "    " if statement.loop else ""
    line = f"{indent}{', '.join(targets)} = {expression.text}"
    head = [statement.loop] if statement.loop else []
    if not statement.comment:
        return [*head, line]
    if len(line) + len(statement.comment) > LINE_LENGTH:
        return [*head, f"{indent}# {statement.comment}", line]
    return [*head, f"{line}  # {statement.comment}"]
