"""What a model is: its operators, tensors, parameters and repeated blocks, captured from a plain `nn.Module`."""

from graphs.capture import Capture, capture
from graphs.errors import CaptureError, DataDependentError, GraphError, UnsupportedOpError
from graphs.interpret import run
from graphs.ir import Block, Buffer, ModuleInfo, Op, OpGraph, Parameter, Ref, Tensor

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
    "capture",
    "run",
]
