"""Matrix products: every letter of the einsum is a factor, the contracted ones are reductions."""

from __future__ import annotations

from collections.abc import Sequence

from graphs.ir import Op, Tensor
from graphs.rules.arguments import arguments
from graphs.rules.build import aligned, make_rule, numbered
from graphs.rules.registry import register
from graphs.rules.rule import Dim, Rule

Tensors = tuple[Tensor, ...]


@register("aten.linear.default")
def linear(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`x[..., h] w[o, h] -> [..., o]`; a sum with a bias is not split, that would add the bias repeatedly."""
    args = arguments(op)
    leading = numbered(len(operands[0].shape) - 1)
    biased = args["bias"] is not None
    return make_rule(
        operands,
        results,
        [[*leading, ("h",)], [("o",), ("h",)], *([[("o",)]] if biased else [])],
        [[*leading, ("o",)]],
        reductions=() if biased else ("h",),
        unsplittable=("h",) if biased else (),
        linear=args.linear_in(("input", "bias"), ("weight", "bias")),
    )


@register("aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.matmul")
def matmul(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`[..., m, k] [..., k, n]` with broadcast leading dimensions, or just `[k]`."""
    first, second = (len(tensor.shape) for tensor in operands)
    rank = max(first, second, 2) - 2
    batch = numbered(rank)
    left: list[Dim] = [("k",)] if first == 1 else [*aligned(batch, first - 2), ("m",), ("k",)]
    right: list[Dim] = [("k",)] if second == 1 else [*aligned(batch, second - 2), ("k",), ("n",)]
    result = [*batch, *([("m",)] if first > 1 else []), *([("n",)] if second > 1 else [])]
    return make_rule(operands, results, [left, right], [result], reductions=("k",), linear=((0,), (1,)))


@register("aten.addmm", "aten.baddbmm")
def addmm(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """A product plus something that broadcasts; a split sum would add that repeatedly."""
    batch = numbered(len(results[0].shape) - 2)
    result: list[Dim] = [*batch, ("m",), ("n",)]
    return make_rule(
        operands,
        results,
        [aligned(result, len(operands[0].shape)), [*batch, ("m",), ("k",)], [*batch, ("k",), ("n",)]],
        [result],
        unsplittable=("k",),
        linear=((0, 1), (0, 2)),
    )


@register("aten.outer", "aten.ger")
def outer(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`[m] [n] -> [m, n]`."""
    return make_rule(operands, results, [[("m",)], [("n",)]], [[("m",), ("n",)]], linear=((0,), (1,)))


@register("aten.einsum")
def einsum(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """The equation's letters are the factors; those that are not in the result are reductions."""
    equation = arguments(op)["equation"].replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    ranks = [
        len(tensor.shape) - len(term.replace("...", "")) for term, tensor in zip(terms, operands, strict=True)
    ]
    broadcast = numbered(max(ranks))
    if not arrow:
        letters = sorted(inputs.replace(",", "").replace(".", ""))
        output = "..." + "".join(letter for letter in letters if letters.count(letter) == 1)
        output = output if broadcast else output[3:]
    operand_dims = [_term(term, aligned(broadcast, rank)) for term, rank in zip(terms, ranks, strict=True)]
    result = _term(output, broadcast)
    summed = {name for dims in operand_dims for dim in dims for name in dim} - {
        name for dim in result for name in dim
    }
    return make_rule(
        operands,
        results,
        operand_dims,
        [result],
        reductions=summed,
        linear=[[index] for index in range(len(terms))],
    )


def _term(term: str, broadcast: Sequence[Dim]) -> list[Dim]:
    before, dots, after = term.partition("...")
    middle = list(broadcast) if dots else []
    return [*((letter,) for letter in before), *middle, *((letter,) for letter in after)]
