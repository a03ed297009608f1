"""Which attention looks back only so far.

A window shows in the graph as a mask, whose values are not known. The module that attends does know: by the
custom of Hugging Face's models it says so in an attribute `sliding_window`.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from graphs.ir import Op, OpGraph


def with_windows(graph: OpGraph, model: nn.Module) -> OpGraph:
    """The graph with `Op.window` of every fused attention whose module has a window."""
    windows = {
        path: module.sliding_window
        for path, module in model.named_modules()
        if isinstance(getattr(module, "sliding_window", None), int)
    }

    def windowed(op: Op) -> Op:
        is_attention = "scaled_dot_product" in op.target and op.module in windows
        return replace(op, window=windows[op.module]) if is_attention else op

    return replace(graph, ops=tuple(map(windowed, graph.ops))) if windows else graph
