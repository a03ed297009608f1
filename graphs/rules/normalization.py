"""Normalizations: what statistics are taken over stays whole."""

from __future__ import annotations

from graphs.ir import Op, Tensor
from graphs.rules.arguments import arguments
from graphs.rules.build import WHOLE, factors, make_rule, numbered
from graphs.rules.registry import register
from graphs.rules.rule import Dim, Rule

Tensors = tuple[Tensor, ...]


@register("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def layer_norm(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Statistics over the last dimensions; the leading ones are independent."""
    args = arguments(op)
    rank = len(operands[0].shape)
    dims = numbered(rank)
    normalized = dims[rank - len(args["normalized_shape"]) :]
    return make_rule(
        operands,
        results,
        args.in_order({"input": dims, "weight": normalized, "bias": normalized}),
        [dims] * len(results),  # mean and deviation, where there are such results, have dimensions of size 1
        unsplittable=factors(normalized),
    )


@register("aten.group_norm")
def group_norm(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`x[n, (g, c), ...]`, statistics over a group of channels: samples and groups are independent."""
    args = arguments(op)
    shape = operands[0].shape
    channels: Dim = ("g", "c")
    inner = [(f"s{index}",) for index in range(len(shape) - 2)]
    dims: list[Dim] = [("n",), channels, *inner]
    return make_rule(
        operands,
        results,
        args.in_order({"input": dims, "weight": [channels], "bias": [channels]}),
        [dims],
        sizes={"g": args["num_groups"], "c": shape[1] // args["num_groups"]},
        unsplittable=factors([("c",), *inner]),
    )


@register("aten.batch_norm", "aten.instance_norm")
def batch_norm(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`x[n, c, ...]`: channels are independent; in training the statistics join all samples, which takes a
    local form of its own, or (instance norm) each sample's pixels. In evaluation they are given, and
    everything is independent."""
    args = arguments(op)
    inner = [(f"s{index}",) for index in range(len(operands[0].shape) - 2)]
    dims: list[Dim] = [("n",), ("c",), *inner]
    per_channel: list[Dim] = [("c",)]
    is_instance = op.target.startswith("aten.instance_norm")
    is_joined = args["use_input_stats"] if is_instance else args["training"]
    form = {"n": "batch_norm_rows"} if is_joined and not is_instance else {}
    names = ("weight", "bias", "running_mean", "running_var")
    return make_rule(
        operands,
        results,
        args.in_order({"input": dims, **dict.fromkeys(names, per_channel)}),
        [dims],
        unsplittable=factors(inner if is_joined else []),
        implemented=form,
    )


@register("aten._weight_norm.default")
def weight_norm(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """`g * v / |v|`, the norm over all dimensions but one: that one can be split."""
    place = arguments(op)["dim"] % len(operands[0].shape)
    dims = [dim if index == place else WHOLE for index, dim in enumerate(numbered(len(operands[0].shape)))]
    return make_rule(operands, results, [dims, dims], [dims], linear=((1,),))


@register("aten.local_response_norm", "aten.channel_shuffle")
def samples_only(op: Op, operands: Tensors, results: Tensors) -> Rule:
    """Samples are independent, nothing is said of the rest."""

    def dims(tensor: Tensor) -> list[Dim]:
        return [("n",), *[WHOLE] * (len(tensor.shape) - 1)]

    return make_rule(
        operands, results, [dims(tensor) for tensor in operands], [dims(tensor) for tensor in results]
    )
