"""Op calls with the splits that they should offer: `factor` with sharded results, `+factor` for a sum."""

from __future__ import annotations

import torch

from tests.graphs.rule_harness import Case

_GENERATOR = torch.Generator().manual_seed(0)


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_GENERATOR)


def i(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=_GENERATOR)


def mask(*shape: int) -> torch.Tensor:
    return x(*shape) > 0


def z(*shape: int) -> torch.Tensor:
    return torch.complex(x(*shape), x(*shape))


def targets(high: int, rows: int) -> torch.Tensor:
    """Labels of which the first rows are ignored, so that shards count different numbers."""
    labels = i(high, rows)
    labels[: rows // 4 + 1] = -100
    return labels


SAME = x(2, 4)

MATMUL = [
    Case("aten.linear.default", (x(2, 4, 6), x(8, 6)), "d0 d1 o +h", linear="0 1"),
    Case("aten.linear.default", (x(2, 4, 6), x(8, 6), x(8)), "d0 d1 o", linear="02 12"),
    Case("aten.linear.default", (x(6), x(8, 6)), "o +h", linear="0 1"),
    Case("aten.mm.default", (x(4, 6), x(6, 8)), "m n +k", linear="0 1"),
    Case("aten.bmm.default", (x(2, 4, 6), x(2, 6, 8)), "d0 m n +k", linear="0 1"),
    Case("aten.matmul.default", (x(2, 4, 6), x(6, 8)), "d0 m n +k", linear="0 1"),
    Case("aten.matmul.default", (x(2, 1, 4, 6), x(4, 6, 8)), "d0 d1 m n +k", linear="0 1"),
    Case("aten.matmul.default", (x(6), x(2, 6, 8)), "d0 n +k", linear="0 1"),
    Case("aten.matmul.default", (x(4, 6), x(6)), "m +k", linear="0 1"),
    Case("aten.mv.default", (x(4, 6), x(6)), "m +k", linear="0 1"),
    Case("aten.dot.default", (x(6), x(6)), "+k", linear="0 1"),
    Case("aten.addmm.default", (x(8), x(4, 6), x(6, 8)), "m n", linear="01 02"),
    Case("aten.baddbmm.default", (x(2, 1, 8), x(2, 4, 6), x(2, 6, 8)), "d0 m n", linear="01 02"),
    Case("aten.outer.default", (x(4), x(6)), "m n", linear="0 1"),
    Case("aten.einsum.default", ("bid,bjd->bij", [x(2, 4, 6), x(2, 8, 6)]), "b i j +d", linear="0 1"),
    Case("aten.einsum.default", ("...id,jd->...ij", [x(2, 4, 6), x(8, 6)]), "d0 i j +d", linear="0 1"),
    Case("aten.einsum.default", ("ij,jk", [x(4, 6), x(6, 2)]), "i k +j", linear="0 1"),
    Case("aten.einsum.default", ("ii->i", [x(4, 4)]), "", linear="0"),
]

POINTWISE = [
    Case("aten.add.Tensor", (x(2, 4, 6), x(6)), "d0 d1 d2", linear="01"),
    Case("aten.add.Tensor", (x(2, 4), x(2, 4)), "d0 d1", {"alpha": 2}, linear="01"),
    Case("aten.add.Tensor", (SAME, SAME), "d0 d1", linear="01"),
    Case("aten.add.Tensor", (x(2, 4), 1.5), "d0 d1"),
    Case("aten.sub.Tensor", (x(2, 1), x(4)), "d0 d1", linear="01"),
    Case("aten.rsub.Scalar", (x(2, 4), 1.0), "d0 d1"),
    Case("aten.mul.Tensor", (x(2, 4), x(4)), "d0 d1", linear="0 1"),
    Case("aten.mul.Tensor", (x(2, 4), mask(2, 4)), "d0 d1", linear="0"),
    Case("aten.mul.Tensor", (SAME, SAME), "d0 d1"),
    Case("aten.mul.Tensor", (x(2, 4), 3.0), "d0 d1", linear="0"),
    Case("aten.mul.Tensor", (x(2, 4), x()), "d0 d1", linear="0 1"),
    Case("aten.div.Tensor", (x(2, 4), x(2, 1)), "d0 d1", linear="0"),
    Case("aten.div.Tensor_mode", (x(2, 4), 0.3), "d0 d1", {"rounding_mode": "floor"}),
    Case("aten.neg.default", (x(2, 4),), "d0 d1", linear="0"),
    Case("aten.gelu.default", (x(2, 4),), "d0 d1", {"approximate": "tanh"}),
    Case("aten.silu.default", (x(2, 4),), "d0 d1"),
    Case("aten.pow.Tensor_Scalar", (x(2, 4), 2), "d0 d1"),
    Case("aten.rsqrt.default", (x(2, 4) ** 2 + 1,), "d0 d1"),
    Case("aten.to.dtype", (x(2, 4), torch.float32), "d0 d1", linear="0"),
    Case("aten.to.dtype", (x(2, 4), torch.int64), "d0 d1"),
    Case("aten.clone.default", (x(2, 4),), "d0 d1", linear="0"),
    Case("aten.type_as.default", (x(2, 4), x(3)), "d0 d1", linear="0"),
    Case("aten.where.self", (mask(4, 4), x(2, 4, 4), x(4)), "d0 d1 d2", linear="12"),
    Case("aten.where.ScalarOther", (mask(4, 4), x(4, 4), -1.0), "d0 d1"),
    Case("aten.masked_fill.Scalar", (x(2, 4, 4), mask(4, 4), 0), "d0 d1 d2", linear="0"),
    Case("aten.masked_fill.Scalar", (x(2, 4, 4), mask(4, 4), -1e9), "d0 d1 d2"),
    Case("aten.dropout.default", (x(2, 4), 0.5, False), "d0 d1"),
    Case("aten.clamp.default", (x(2, 4), -1.0, 1.0), "d0 d1"),
    Case("aten.maximum.default", (x(2, 4), x(4)), "d0 d1"),
    Case("aten.max.other", (x(2, 4), x(4)), "d0 d1"),
    Case("aten.eq.Scalar", (i(3, 2, 4), 1), "d0 d1"),
    Case("aten.lerp.Scalar", (x(2, 4), x(2, 4), 0.3), "d0 d1"),
    Case("aten.addcmul.default", (x(2, 4), x(4), x(2, 1)), "d0 d1"),
    Case("aten.prelu.default", (x(2, 4, 6), x(4)), "d0 d1 d2"),
    Case("aten.bucketize.Tensor", (x(2, 4), torch.arange(3.0)), "d0 d1"),
    Case("aten.zeros_like.default", (x(2, 4),), "d0 d1"),
    Case("aten.full_like.default", (x(2, 4), 7.0), "d0 d1"),
    Case("aten.complex.default", (x(2, 4), x(2, 4)), "d0 d1", linear="01"),
    Case("aten.polar.default", (x(2, 4), x(2, 4)), "d0 d1"),
]

VIEW = [
    Case("aten.reshape.default", (x(2, 4, 24), [2, 4, 4, 6]), "d0 d1 d2 d3", linear="0"),
    Case("aten.reshape.default", (x(2, 4, 4, 6), [2, 4, 24]), "d0 d1 d2 d3", linear="0"),
    Case("aten.reshape.default", (x(2, 4, 6), [8, 6]), "d0 d1 d2", linear="0"),
    Case("aten.reshape.default", (x(8, 6), [2, 4, 1, 6]), "d0 d1 d2", linear="0"),
    Case("aten.reshape.default", (x(6, 4, 2), [4, 6, 2]), "d0 d5", linear="0"),
    Case("aten.reshape.default", (x(1, 4), [4, 1]), "d0", linear="0"),
    Case("aten.reshape.default", (x(2, 3, 4), [24]), "d0 d2", linear="0"),
    Case("aten.reshape.default", (x(2, 12, 4), [2, 4, 12]), "d0 d1 d3", linear="0"),
    Case("aten.reshape.default", (x(1), []), "", linear="0"),
    Case("aten.transpose.int", (x(2, 4, 6), 1, -1), "d0 d1 d2", linear="0"),
    Case("aten.permute.default", (x(2, 4, 6), [2, 0, 1]), "d0 d1 d2", linear="0"),
    Case("aten.t.default", (x(2, 4),), "d0 d1", linear="0"),
    Case("aten.movedim.int", (x(2, 4, 6), 0, -1), "d0 d1 d2", linear="0"),
    Case("aten.movedim.intlist", (x(2, 4, 6), [2, 0], [0, 1]), "d0 d1 d2", linear="0"),
    Case("aten.unsqueeze.default", (x(2, 4), -1), "d0 d1", linear="0"),
    Case("aten.squeeze.dim", (x(2, 1, 4), 1), "d0 d2", linear="0"),
    Case("aten.squeeze.default", (x(2, 1, 4, 1),), "", linear="0"),
    Case("aten.squeeze.dims", (x(2, 1, 4, 1), [0, 3]), "d2", linear="0"),
    Case("aten.expand.default", (x(2, 1, 4), [6, 2, 8, 4]), "d0 d1 d2 d3", linear="0"),
    Case("aten.repeat.default", (x(2, 4), [6, 1, 2]), "r0 d1 d2 r2", linear="0"),
    Case("aten.tile.default", (x(2, 4), [1, 2]), "d0 d1", linear="0"),
    Case("aten.repeat_interleave.self_int", (x(2, 4, 6), 2, 1), "d0 d1 d2", linear="0"),
    Case("aten.repeat_interleave.self_int", (x(2, 4), 3), "d0 d1", linear="0"),
    Case("aten.select.int", (x(2, 4, 6), 1, -1), "d0 d2", linear="0"),
    Case("aten.unbind.int", (x(2, 4, 6), 1), "d0 d2", linear="0"),
    Case("aten.diagonal.default", (x(2, 4, 4), 0, 1, 2), "d0", linear="0"),
    Case("aten.flip.default", (x(2, 4, 6), [1]), "d0 d2", linear="0"),
    Case("aten.roll.default", (x(2, 4, 6), [1], [1]), "d0 d2", linear="0"),
    Case("aten.unfold.default", (x(2, 8, 4), 1, 3, 2), "d0 d2", linear="0"),
    Case("aten.constant_pad_nd.default", (x(2, 4, 6), [1, 0]), "d0 d1", linear="0"),
    Case("aten.constant_pad_nd.default", (x(2, 4, 6), [0, 0, 0, 1], 2.0), "d0 d2"),
    Case("aten.tril.default", (x(2, 4, 4),), "d0", linear="0"),
    Case("aten.pixel_shuffle.default", (x(2, 8, 4, 3), 2), "d0 c h", linear="0"),
    Case("aten.pixel_shuffle.default", (x(8, 4, 2), 2), "c h w", linear="0"),
    Case("aten.pixel_unshuffle.default", (x(2, 2, 8, 6), 2), "d0 c h", linear="0"),
    Case("aten.view_as_complex.default", (x(2, 4, 2),), "d0 d1", linear="0"),
    Case("aten.view_as_real.default", (z(2, 4),), "d0 d1", linear="0"),
]

SECTIONS = [
    Case("aten.split.Tensor", (x(2, 12), 4, -1), "d0 d1", linear="0"),
    Case("aten.split.Tensor", (x(2, 10), 4, 1), "d0 d1", linear="0"),
    Case("aten.split_with_sizes.default", (x(2, 12), [6, 2, 4], 1), "d0 d1", linear="0"),
    Case("aten.split_with_sizes.default", (x(2, 12), [7, 5], 1), "d0", linear="0"),
    Case("aten.chunk.default", (x(2, 12), 3, 1), "d0 d1", linear="0"),
    Case("aten.slice.Tensor", (x(2, 12), 1, 4, 10), "d0 d1", linear="0"),
    Case("aten.slice.Tensor", (x(2, 12), 1, 6, 12), "d0 d1", linear="0"),
    Case("aten.slice.Tensor", (x(2, 12), 1, 0, 5), "d0", linear="0"),
    Case("aten.slice.Tensor", (x(2, 12), 1, 0, 12, 2), "d0", linear="0"),
    Case("aten.narrow.default", (x(2, 12), 1, 4, 4), "d0 d1", linear="0"),
    Case("aten.cat.default", ([x(2, 4), x(2, 6), x(2, 2)], 1), "d0 d1", linear="012"),
    Case("aten.cat.default", ([x(2, 1, 4), x(2, 2, 4)], 1), "d0 d2", linear="01"),
    Case("aten.cat.default", ([x(2, 4), x(2, 4)], -1), "d0 d1", linear="01"),
    Case("aten.stack.default", ([x(2, 4), x(2, 4)], 1), "d0 d1", linear="01"),
    Case("aten.glu.default", (x(2, 8),), "d0 d1"),
    Case("aten.select_scatter.default", (x(2, 4, 6), x(2, 6), 1, 2), "d0 d2", linear="01"),
    Case("aten.slice_scatter.default", (x(2, 4), x(2, 2), 1, 0, 2), "d0", linear="01"),
]

REDUCE = [
    Case("aten.sum.default", (x(2, 4),), "+d0 +d1", linear="0"),
    Case("aten.sum.dim_IntList", (x(2, 4, 6), [0, -1]), "+d0 d1 +d2", linear="0"),
    Case("aten.sum.dim_IntList", (x(2, 4, 6), [1], True), "d0 +d1 d2", linear="0"),
    Case("aten.sum.dim_IntList", (mask(2, 4), [1]), "d0 +d1"),
    Case("aten.mean.default", (x(2, 4),), "+d0 +d1", linear="0"),
    Case("aten.mean.dim", (x(2, 4, 6), [-1], True), "d0 d1 +d2", linear="0"),
    Case("aten.amax.default", (x(2, 4), [1]), "d0"),
    Case("aten.max.dim", (x(2, 4), 1, True), "d0"),
    Case("aten.max.default", (x(2, 4),), ""),
    Case("aten.argmax.default", (x(2, 4), -1), "d0"),
    Case("aten.logsumexp.default", (x(2, 4), [1]), "d0"),
    Case("aten.var.correction", (x(2, 4), [1]), "d0", {"correction": 1, "keepdim": True}),
    Case("aten.linalg_vector_norm.default", (x(2, 4), 2, [1]), "d0"),
    Case("aten.any.dim", (mask(2, 4), 1), "d0"),
    Case("aten.softmax.int", (x(2, 4, 6), -1), "d0 d1"),
    Case("aten.log_softmax.int", (x(2, 4, 6), 1), "d0 d2"),
    Case("aten.cumsum.default", (x(2, 4), 1), "d0", linear="0"),
    Case("aten.sort.default", (x(2, 4), 0), "d1"),
    Case("aten.sort.stable", (x(2, 4),), "d0", {"stable": True, "dim": 1}),
    Case("aten.argsort.default", (x(2, 4),), "d0"),
    Case("aten.topk.default", (x(2, 8), 2), "d0"),
    Case("aten.fft_fft.default", (z(2, 4),), "d0", linear="0"),
    Case("aten.fft_rfft.default", (x(2, 4),), "d0", linear="0"),
    Case("aten.histc.default", (x(8), 4, -3, 3), "+d0"),
    Case("aten.bincount.default", (i(4, 8),), ""),
]

ATTENTION = [
    Case(
        "aten.scaled_dot_product_attention.default",
        (x(2, 4, 6, 8), x(2, 4, 10, 8), x(2, 4, 10, 8)),
        "d0 h s",
        linear="2",
    ),
    Case(
        "aten.scaled_dot_product_attention.default",
        (x(2, 4, 6, 8), x(2, 4, 6, 8), x(2, 4, 6, 8), None, 0.0, True),
        "d0 h",
        linear="2",
    ),
    Case(
        "aten.scaled_dot_product_attention.default",
        (x(2, 8, 6, 4), x(2, 2, 6, 4), x(2, 2, 6, 4), None, 0.0, True),
        "d0 h g",
        {"enable_gqa": True},
        linear="2",
    ),
    Case(
        "aten.scaled_dot_product_attention.default",
        (x(2, 4, 6, 8), x(2, 2, 6, 8), x(2, 2, 6, 8), x(2, 1, 6, 6)),
        "d0 h g s",
        {"enable_gqa": True, "scale": 0.3},
        linear="2",
    ),
    Case(
        "aten.scaled_dot_product_attention.default",
        (x(2, 4, 6, 8), x(2, 1, 6, 8), x(2, 1, 6, 8), x(4, 6, 6)),
        "d0 h s",
        {"enable_gqa": True},
        linear="2",
    ),
    Case(
        "aten.scaled_dot_product_attention.default",
        (x(4, 6, 8), x(4, 6, 8), x(4, 6, 8), mask(6, 6) | True),
        "h s",
        linear="2",
    ),
]

NORMALIZATION = [
    Case("aten.layer_norm.default", (x(2, 4, 6), [6], x(6), x(6)), "d0 d1"),
    Case("aten.layer_norm.default", (x(2, 4, 6), [4, 6]), "d0"),
    Case("aten.native_layer_norm.default", (x(2, 4, 6), [6], x(6), None, 1e-5), "d0 d1"),
    Case("aten.rms_norm.default", (x(2, 4, 6), [6], x(6), 1e-6), "d0 d1"),
    Case("aten._fused_rms_norm.default", (x(2, 4, 6), [6], x(6), 1e-6), "d0 d1"),
    Case("aten.group_norm.default", (x(2, 12, 5), 4, x(12), x(12)), "n g"),
    Case("aten.group_norm.default", (x(2, 4, 5), 1), "n"),
    Case("aten.batch_norm.default", (x(4, 6, 2), x(6), x(6), None, None, True, 0.1, 1e-5, False), "n c"),
    Case(
        "aten.batch_norm.default",
        (x(4, 6, 2), x(6), x(6), x(6), x(6) ** 2 + 1, False, 0.1, 1e-5, False),
        "n c s0",
        constants=(3, 4),
    ),
    Case("aten._weight_norm.default", (x(4, 6, 2), x(1, 6, 1), 1), "d1", linear="1"),
    Case("aten.instance_norm.default", (x(4, 6, 8), x(6), x(6), None, None, True, 0.1, 1e-5, False), "n c"),
]

EMBEDDING_AND_LOSS = [
    Case("aten.embedding.default", (x(8, 6), i(8, 2, 4)), "+v h d0 d1", linear="0"),
    Case("aten.embedding.default", (x(8, 6), i(8, 4), -1, True), "h", linear="0"),
    Case("aten.cross_entropy_loss.default", (x(8, 6), targets(6, 8)), "+d0 c"),
    Case("aten.cross_entropy_loss.default", (x(8, 6), targets(6, 8), None, 2), "+d0 c"),
    Case("aten.cross_entropy_loss.default", (x(8, 6), targets(6, 8), None, 0), "d0"),
    Case("aten.cross_entropy_loss.default", (x(8, 6), i(6, 8), x(6) ** 2), "", constants=(2,)),
    Case("aten.cross_entropy_loss.default", (x(8, 6), i(6, 8), x(6) ** 2, 2), "+d0", constants=(2,)),
    Case("aten.cross_entropy_loss.default", (x(8, 6, 4), i(6, 8, 4), None, 2), "+d0 +d1"),
    Case("aten.cross_entropy_loss.default", (x(8, 6, 4), targets(6, 8)[:, None].expand(8, 4)), "+d0 +d1"),
    Case("aten.cross_entropy_loss.default", (x(8, 6), x(8, 6).softmax(1), None, 0), "d0"),
    Case("aten.nll_loss_nd.default", (x(8, 6), targets(6, 8)), "", linear="0"),
    Case("aten.nll_loss_nd.default", (x(8, 6), targets(6, 8), None, 2), "+d0", linear="0"),
    Case("aten.mse_loss.default", (x(8, 6), x(8, 6)), "+d0 +d1"),
    Case("aten.mse_loss.default", (x(8, 6), x(8, 6), 0), "d0 d1"),
    Case("aten.l1_loss.default", (x(8, 6), x(8, 6), 2), "+d0 +d1"),
    Case("aten.huber_loss.default", (x(8, 6), x(8, 6)), "+d0 +d1"),
    Case(
        "aten.binary_cross_entropy_with_logits.default",
        (x(8, 6), x(8, 6), None, x(6) ** 2),
        "+d0 +d1",
        constants=(2,),
    ),
    Case("aten.kl_div.default", (x(8, 6), x(8, 6).softmax(1), 2), "+d0 +d1"),
]

CONVOLUTION = [
    Case("aten.conv1d.default", (x(2, 4, 9), x(6, 4, 3)), "n o +i", linear="0 1"),
    Case("aten.conv2d.default", (x(2, 4, 8, 8), x(6, 4, 3, 3), x(6), [2, 2], [1, 1]), "n o", linear="02 12"),
    Case("aten.conv2d.padding", (x(2, 4, 8, 8), x(6, 4, 3, 3), None, [1, 1], "same"), "n o +i", linear="0 1"),
    Case("aten.conv1d.default", (x(2, 4, 9), x(4, 1, 3), x(4), [1], [2], [1], 4), "n g", linear="02 12"),
    Case(
        "aten.conv2d.default",
        (x(2, 8, 5, 5), x(12, 2, 3, 3), None, [1, 1], [0, 0], [1, 1], 4),
        "n g",
        linear="0 1",
    ),
    Case("aten.conv3d.default", (x(2, 4, 3, 3, 3), x(6, 4, 2, 2, 2)), "n o +i", linear="0 1"),
    Case("aten.conv_transpose2d.input", (x(2, 4, 5, 5), x(4, 6, 3, 3)), "n o +i", linear="0 1"),
    Case(
        "aten.convolution.default",
        (x(2, 4, 8, 8), x(6, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        "n o +i",
        linear="0 1",
    ),
    Case("aten.max_pool2d.default", (x(2, 4, 6, 6), [2, 2]), "d0 d1"),
    Case("aten.max_pool2d_with_indices.default", (x(2, 4, 6, 6), [2, 2]), "d0 d1"),
    Case("aten.avg_pool1d.default", (x(2, 4, 6), [2]), "d0 d1", linear="0"),
    Case("aten.adaptive_avg_pool2d.default", (x(2, 4, 6, 6), [1, 1]), "d0 d1", linear="0"),
    Case("aten.upsample_nearest2d.vec", (x(2, 4, 3, 3), None, [2.0, 2.0]), "d0 d1", linear="0"),
    Case("aten.upsample_bilinear2d.vec", (x(2, 4, 3, 3), [6, 6], False, None), "d0 d1", linear="0"),
    Case("aten.reflection_pad1d.default", (x(2, 4, 6), [1, 1]), "d0 d1", linear="0"),
]

INDEX = [
    Case("aten.index.Tensor", (x(8, 4), [i(8, 6)]), "i0 d1", linear="0"),
    Case("aten.index.Tensor", (x(2, 8, 4), [None, i(8, 6, 2)]), "d0 i0 i1 d2", linear="0"),
    Case("aten.index.Tensor", (x(8, 4, 6), [i(8, 2, 1), i(4, 6)]), "i0 i1 d2", linear="0"),
    Case("aten.index.Tensor", (x(8, 4, 6), [i(8, 2), None, i(6, 2)]), "i0 d1", linear="0"),
    Case("aten.index_put.default", (x(8, 4), [i(8, 6)], x(6, 4), True), "d1", linear="02"),
    Case("aten.gather.default", (x(4, 8), 1, i(8, 4, 6)), "d0 d1", linear="0"),
    Case("aten.gather.default", (x(4, 8), 1, i(8, 2, 6)), "d1", linear="0"),
    Case(
        "aten.scatter.src",
        (x(4, 8), 1, torch.tensor([[0, 3], [1, 2], [5, 4], [7, 0]]), x(4, 2)),
        "d0",
        linear="02",
    ),
    Case("aten.scatter.value", (x(4, 8), 1, i(8, 4, 2), 1.0), "d0"),
    Case("aten.scatter_add.default", (x(8, 4), 0, i(8, 6, 4), x(6, 4)), "d1", linear="02"),
    Case("aten.index_select.default", (x(8, 4), 0, i(8, 6)), "d0 d1", linear="0"),
    Case("aten.index_add.default", (x(8, 4), 0, i(8, 6), x(6, 4)), "d1", linear="02"),
    Case("aten.index_fill.int_Tensor", (x(4, 8), 1, i(8, 6), x()), "d0", linear="02"),
    Case("aten.one_hot.default", (i(4, 2, 6), 4), "d0 d1"),
]

FACTORY = [
    Case("aten.full.default", ([2, 4], 3.0), "d0 d1"),
    Case("aten.zeros.default", ([2, 4],), "d0 d1"),
    Case("aten.new_ones.default", (x(2, 5), [2, 4, 6]), "d0 d1 d2"),
    Case("aten.new_zeros.default", (x(3, 2, 5), [4]), "d0"),
    Case("aten.arange.default", (8,), ""),
    Case("aten.scalar_tensor.default", (2.0,), ""),
    Case("aten.meshgrid.indexing", ([x(4), x(6)],), "d0 d1", {"indexing": "ij"}),
]

OTHERS = [
    Case(
        "aten._grouped_mm.default",
        (x(8, 16).bfloat16(), x(2, 16, 16).bfloat16()),
        "n +k",
        {"offs": torch.tensor([3, 8], dtype=torch.int32)},
        linear="0 1",
    ),
    Case(
        "aten.lstm.input",
        (
            x(2, 5, 4),
            [x(1, 2, 3), x(1, 2, 3)],
            [x(12, 4), x(12, 3), x(12), x(12)],
            True,
            1,
            0.0,
            False,
            False,
            True,
        ),
        "b",
    ),
    Case(
        "aten.gru.input",
        (x(5, 2, 4), x(1, 2, 3), [x(9, 4), x(9, 3), x(9), x(9)], True, 1, 0.0, False, False, False),
        "b",
    ),
]

CASES = [
    *MATMUL,
    *POINTWISE,
    *VIEW,
    *SECTIONS,
    *REDUCE,
    *ATTENTION,
    *NORMALIZATION,
    *EMBEDDING_AND_LOSS,
    *CONVOLUTION,
    *INDEX,
    *FACTORY,
    *OTHERS,
]
