"""Table lookups."""

from __future__ import annotations

from graphs.ir import Op, Tensor
from graphs.rules.arguments import arguments
from graphs.rules.build import factors, make_rule, numbered
from graphs.rules.registry import register
from graphs.rules.rule import Rule


@register("aten.embedding")
def embedding(op: Op, operands: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> Rule:
    """`table[v, h] indices[...] -> [..., h]`.

    With the vocabulary split, a rank finds the rows of the words it has and zero for the others, a partial
    sum.
    """
    args = arguments(op)
    dims = numbered(len(operands[1].shape))
    counted = args["scale_grad_by_freq"]  # gradients are divided by how often an index occurs among all
    return make_rule(
        operands,
        results,
        [[("v",), ("h",)], dims],
        [[*dims, ("h",)]],
        reductions=("v",),
        unsplittable={"v", *factors(dims)} if counted else (),
        linear=((0,),),
        implemented={"v": "vocab_parallel_embedding"},
    )
