"""What a model is: operators, tensors, parameters and repeated blocks, captured from a plain `nn.Module`."""

from graphs.uncollected import uncollected

with uncollected():  # it imports the compiler of torch
    from graphs.batch import inputs_of_any_batch
    from graphs.blocks import find_blocks
    from graphs.capture import Capture, capture
    from graphs.errors import CaptureError, DataDependentError, GraphError, UnsupportedOpError
    from graphs.interpret import resolve, run
    from graphs.ir import Block, Buffer, ModuleInfo, Op, OpGraph, Parameter, Ref, Tensor
    from graphs.measure import measured
    from graphs.memoryless import build_without_memory

__all__ = [
    "Block",
    "Buffer",
    "Capture",
    "CaptureError",
    "DataDependentError",
    "GraphError",
    "ModuleInfo",
    "Op",
    "OpGraph",
    "Parameter",
    "Ref",
    "Tensor",
    "UnsupportedOpError",
    "build_without_memory",
    "capture",
    "find_blocks",
    "inputs_of_any_batch",
    "measured",
    "resolve",
    "run",
    "uncollected",
]
