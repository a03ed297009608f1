"""Calls of ops that DTensor has strategies for and the table of `rule_cases` does not hold.

They are there to compare layouts; what they split is not written down a second time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor

from graphs.interpret import resolve
from tests.graphs.rule_cases import CASES, i, mask, x
from tests.graphs.rule_harness import Case

_IMAGE = x(2, 4, 6, 6)
_VOLUME = x(2, 4, 4, 4, 4)

REDUCTIONS = [
    *(
        Case(f"aten.{name}.default", (x(2, 4),), "")
        for name in ("amin", "min", "median", "nanmedian", "prod", "nansum")
    ),
    *(Case(f"aten.{name}.default", (mask(2, 4),), "") for name in ("all", "any")),
    *(Case(f"aten.{name}.dim", (x(2, 4), 1), "") for name in ("min", "median", "nanmedian")),
    *(
        Case(f"aten.{name}.default", (x(2, 4), 1), "")
        for name in ("argmin", "cumprod", "cummax", "cummin", "mode")
    ),
    *(Case(f"aten.{name}.correction", (x(2, 4), [1]), "") for name in ("std", "var_mean")),
    Case("aten.kthvalue.default", (x(2, 4), 2, 1), ""),
    Case("aten.logcumsumexp.default", (x(2, 4), 1), ""),
    Case("aten.prod.dim_int", (x(2, 4), 1), ""),
    Case("aten.all.dim", (mask(2, 4), 1), ""),
    Case("aten.any.dims", (mask(2, 4), [1]), ""),
    Case("aten.norm.Scalar", (x(2, 4),), ""),
    Case("aten._softmax.default", (x(2, 4), 1, False), ""),
    Case("aten._log_softmax.default", (x(2, 4), 1, False), ""),
]

ELEMENTS = [
    *(
        Case(f"aten.{name}.default", (x(2, 4).sigmoid(),), "")
        for name in (
            *("_to_copy", "alias", "bernoulli", "contiguous", "detach"),
            *("empty_like", "ones_like", "rand_like", "randn_like"),
        )
    ),
    Case("aten.randint_like.default", (x(2, 4), 5), ""),
    Case("aten.randint_like.low_dtype", (x(2, 4), 1, 5), ""),
    Case("aten.native_dropout.default", (x(2, 4), 0.5, True), ""),
    Case("aten.clip.default", (x(2, 4), -1.0, 1.0), ""),
    Case("aten.div.Scalar_mode", (x(2, 4), 0.3), "", {"rounding_mode": "floor"}),
    Case("aten.round.decimals", (x(2, 4),), "", {"decimals": 1}),
    Case("aten.triu.default", (x(2, 4, 4),), ""),
    Case("aten.new_empty.default", (x(2, 4), [2, 6]), ""),
    Case("aten.new_full.default", (x(2, 4), [2, 6], 1.0), ""),
    Case("aten.index_fill.int_Scalar", (x(4, 6), 1, i(6, 2), 1.0), ""),
    Case("aten.index_reduce.default", (x(4, 6), 1, i(6, 2), x(4, 2), "amax"), ""),
]

IMAGES = [
    Case("aten.adaptive_avg_pool1d.default", (x(2, 4, 6), [2]), ""),
    Case("aten.adaptive_max_pool1d.default", (x(2, 4, 6), [2]), ""),
    Case("aten.adaptive_max_pool2d.default", (_IMAGE, [2, 2]), ""),
    Case("aten.adaptive_max_pool3d.default", (_VOLUME, [2, 2, 2]), ""),
    Case("aten.avg_pool2d.default", (_IMAGE, [2, 2]), ""),
    Case("aten.avg_pool3d.default", (_VOLUME, [2, 2, 2]), ""),
    Case("aten.max_pool1d_with_indices.default", (x(2, 4, 6), [2]), ""),
    Case("aten.max_pool3d_with_indices.default", (_VOLUME, [2, 2, 2]), ""),
    Case("aten.upsample_linear1d.default", (x(2, 4, 6), [8], False), ""),
    Case("aten.upsample_bilinear2d.default", (_IMAGE, [8, 8], False), ""),
    Case("aten.upsample_bicubic2d.default", (_IMAGE, [8, 8], False), ""),
    Case("aten.upsample_trilinear3d.default", (_VOLUME, [6, 6, 6], False), ""),
    Case("aten.upsample_nearest1d.default", (x(2, 4, 6), [8]), ""),
    Case("aten.upsample_nearest2d.default", (_IMAGE, [8, 8]), ""),
    Case("aten.upsample_nearest3d.default", (_VOLUME, [6, 6, 6]), ""),
]


def pointwise() -> Iterator[Case]:
    """A call of every further pointwise operator that DTensor has a strategy for."""
    tested = {case.target for case in CASES}
    for op in sorted(with_strategy(), key=str):
        if torch.Tag.pointwise in op.tags and str(op) not in tested and not op._schema.is_mutable:
            case = _example(op)
            if case is not None:
                yield case


def with_strategy() -> set[OpOverload]:
    """Operators whose placements DTensor propagates without taking them to pieces."""
    known = DTensor._op_dispatcher.sharding_propagator
    return {*known.op_strategy_funcs, *known.op_single_dim_strategy_funcs, *known.op_to_rules}


def _example(op: OpOverload) -> Case | None:
    """Operands of floats, else of integers, every tensor given, numbers 2; None where neither runs."""
    if op.namespace != "aten" or any(argument.is_out for argument in op._schema.arguments):
        return None
    for tensor in (x(2, 4).sigmoid(), i(3, 2, 4) + 1):
        args: list[torch.Tensor | int] = []
        for argument in op._schema.arguments:
            if "Tensor" in str(argument.type):
                args.append(tensor.clone())
            elif not argument.has_default_value():
                args.append(2)
        try:
            results = resolve(str(op))(*args)
        except (RuntimeError, TypeError, NotImplementedError):
            continue  # an op that does not take made-up arguments is no case
        if isinstance(results, torch.Tensor | tuple):
            return Case(str(op), tuple(args), "")
    return None


MORE = [*REDUCTIONS, *ELEMENTS, *IMAGES, *pointwise()]
