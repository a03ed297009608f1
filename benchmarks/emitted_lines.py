"""How long emitted models are beside the modules that they stand for (`python -m benchmarks.emitted lines`).

Lines are those with code: neither blank, nor comment, nor docstring. Of the original they are those of the
distinct classes among its modules that torch does not bring itself. Where a program takes over what the
original has in functions (rotary angles, masks, the loss), they count on its side alone.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from autopar.errors import AutoparError
from benchmarks.model_matrix import COLUMNS, Column, compiled
from tests.autopar.case_runner import original
from tests.models import ALL

PLANS: Mapping[str, Column] = {
    "one device": Column(),
    **{name: COLUMNS[name] for name in ("ZeRO-3 dp 2, tp 2", "tp 2, sequence parallel", "cp 2", "1F1B")},
}


def lines_of_code(source: str) -> int:
    """Lines that hold a part of a statement which is no docstring."""
    tree = ast.parse(textwrap.dedent(source))
    held: set[int] = set()
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not is_text:
            held.add(node.lineno)
            inner = [line for field in ("body", "orelse", "finalbody") for line in _span(node, field)]
            held |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1)) - set(inner)
    return sum(
        1
        for number, line in enumerate(source.splitlines(), 1)
        if number in held and line.strip()[:1] not in ("", "#")
    )


def _span(node: ast.stmt, field: str) -> Sequence[int]:
    """The lines of a block inside of a statement, the docstring included."""
    body = getattr(node, field, None)
    return range(body[0].lineno, (body[-1].end_lineno or 0) + 1) if body else ()


def lines_of_original(model: nn.Module) -> int:
    """Lines of the classes that make up a model."""
    kinds = {type(each) for each in model.modules()}
    return sum(
        lines_of_code(inspect.getsource(kind))
        for kind in kinds
        if not kind.__module__.startswith(("torch.", "transformers.activations"))
    )


def table(names: Sequence[str]) -> str:
    """Lines of code by model and plan, as multiples of those of the original."""
    rows = [f"| lines | original | {' | '.join(PLANS)} |", "| --- |" + " ---: |" * (1 + len(PLANS))]
    for name in names or [known.name for known in ALL]:
        given = original(name, torch.float32)
        length = lines_of_original(given.model)
        cells = [_cell(name, column, length) for column in PLANS.values()]
        rows.append(f"| {name} | {length} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(name: str, column: Column, length: int) -> str:
    try:
        program = compiled(original(name, torch.float32), column)
    except AutoparError:
        return "refused"
    return f"{lines_of_code(program.source) / length:.1f}"
