"""Scaled dot-product attention."""

from __future__ import annotations

from graphs.ir import Op, Tensor
from graphs.rules.arguments import arguments
from graphs.rules.build import aligned, make_rule, numbered
from graphs.rules.registry import register
from graphs.rules.rule import Dim, Rule


@register("aten.scaled_dot_product_attention.default")
def attention(op: Op, operands: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> Rule:
    """`q[..., h, s, d] k[..., h, t, d] v[..., h, t, e] -> [..., h, s, e]`, a mask `[..., h, s, t]` added.

    Batch and heads are independent. With `enable_gqa` the g query heads of one key head stand together: the
    head dimension of the queries is (h, g). Query rows are independent too, but where `is_causal` derives the
    mask from their position; a context axis splits them there too, and must know where a rank's rows begin.
    Keys and head dimensions stay whole.
    """
    args = arguments(op)
    query, key = operands[0].shape, operands[1].shape
    rank = len(query)
    batch = numbered(max(rank - 3, 0))
    heads: list[Dim] = [("h",)] if rank > 2 else []
    query_heads, sizes = heads, {}
    if args["enable_gqa"] and query[-3] != key[-3] > 1:
        query_heads, sizes = [("h", "g")], {"h": key[-3], "g": query[-3] // key[-3]}
    result: list[Dim] = [*batch, *query_heads, ("s",), ("e",)]
    mask: list[Dim] = [*result[:-1], ("t",)]
    return make_rule(
        operands,
        results,
        args.in_order(
            {
                "query": [*result[:-1], ("d",)],
                "key": [*batch, *heads, ("t",), ("d",)],
                "value": [*batch, *heads, ("t",), ("e",)],
                "attn_mask": aligned(mask, len(operands[-1].shape)),
            }
        ),
        [result],
        sizes=sizes,
        unsplittable={"t", "d", "e"} | ({"s"} if args["is_causal"] else set()),
        contiguous=("s",),
        linear=args.linear_in(("value",)),
    )
