"""A `forward` that says that it returns a tensor where a type checker cannot see it: a module may return
anything."""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence

from autopar.rewrite.naming import RESERVED, fresh

_CALLABLES = {"layer"}
"""Variables and functions whose result has no type."""

_FUNCTIONS = {"max_pool2d"}
"""Functions of torch that are not annotated."""

_METHODS = {"split"}
"""Methods of tensors that are not annotated."""


def with_typed_result(lines: Sequence[str], result: str, base: str, arguments: Collection[str]) -> list[str]:
    """The body of a function that ends in the return of an expression; where that has no type, by way of a
    variable that has one.

    `base` is what to call it; `arguments` have types.
    """
    untyped: set[str] = set()
    assigned: dict[str, int] = {}
    assignments = (node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.Assign))
    for node in sorted(assignments, key=lambda node: node.lineno):
        names = (each.id for each in ast.walk(node.targets[0]) if isinstance(each, ast.Name))
        targets = {name for name in names if name not in arguments}
        for name in targets:
            assigned.setdefault(name, node.lineno - 1)
        if _is_untyped(node.value, untyped):
            untyped |= targets
        else:
            untyped -= targets
    if not _is_untyped(ast.parse(result, mode="eval").body, untyped):
        return [*lines, f"return {result}"]
    name = result if result.isidentifier() else fresh(base, RESERVED)
    typed = list(lines)
    if name in assigned:
        line = typed[assigned[name]]
        if line.lstrip().startswith(f"{name} = "):
            typed[assigned[name]] = line.replace(f"{name} = ", f"{name}: Tensor = ", 1)
        else:
            typed.insert(assigned[name], f"{name}: Tensor")
    if name != result:
        is_new = name not in assigned and name not in arguments
        typed.append(f"{name}{': Tensor' if is_new else ''} = {result}")
    return [*typed, f"return {name}"]


def _is_untyped(node: ast.expr, untyped: Collection[str]) -> bool:
    """Whether an expression has no type, where these variables have none."""
    match node:
        case ast.Name(id=name):
            return name in untyped
        case ast.Call(func=ast.Name(id=name)):
            return name in _CALLABLES
        case ast.Call(func=ast.Attribute(value=value, attr=attribute)):
            path = ast.unparse(value)
            if path in {"torch", "F"}:
                return attribute in _FUNCTIONS
            is_module = path.startswith(("self", "torch.ops."))
            return is_module or attribute in _METHODS or _is_untyped(value, untyped)
        case ast.Call(func=ast.Subscript()):
            return True
        case ast.Subscript(value=value) | ast.Attribute(value=value):
            return _is_untyped(value, untyped)
        case ast.BinOp(left=left, right=right):
            return _is_untyped(left, untyped) or _is_untyped(right, untyped)
        case ast.UnaryOp(operand=operand):
            return _is_untyped(operand, untyped)
    return False
