"""Operator graphs made by hand, an op at a time."""

from __future__ import annotations

from typing import Any

import torch

from graphs.ir import Op, OpGraph, Parameter, Ref, Tensor


class GraphBuilder:
    """Adds ops one by one; every method returns the name of the tensor it makes."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []
        self.inputs: list[str] = []
        self.parameters: list[Parameter] = []

    def input(self, *shape: int) -> str:
        self.inputs.append(self._tensor(f"input{len(self.inputs)}", shape, requires_grad=False))
        return self.inputs[-1]

    def parameter(self, *shape: int) -> str:
        name = self._tensor(f"weight{len(self.parameters)}", shape, requires_grad=True)
        self.parameters.append(Parameter(name, name))
        return name

    def linear(self, x: str, size: int) -> str:
        shape = self.tensors[x].shape
        weight = self.parameter(size, shape[-1])
        flops = 2 * size * self.tensors[x].num_elements
        return self._op(
            "aten.linear.default", (Ref(x), Ref(weight)), (*shape[:-1], size), flops, saved=(x, weight)
        )

    def norm(self, x: str) -> str:
        shape = self.tensors[x].shape
        weight = self.parameter(shape[-1])
        return self._op(
            "aten.layer_norm.default",
            (Ref(x), [shape[-1]], Ref(weight)),
            shape,
            saved=(x, weight),
            internal=8,
        )

    def relu(self, x: str) -> str:
        name = f"relu{len(self.ops)}"
        return self._op("aten.relu.default", (Ref(x),), self.tensors[x].shape, saved=(name,), name=name)

    def drop(self, x: str) -> str:
        return self._op("aten.dropout.default", (Ref(x), 0.5, True), self.tensors[x].shape)

    def add(self, x: str, y: str) -> str:
        return self._op("aten.add.Tensor", (Ref(x), Ref(y)), self.tensors[x].shape)

    def mul(self, x: str, y: str) -> str:
        return self._op("aten.mul.Tensor", (Ref(x), Ref(y)), self.tensors[x].shape, saved=(x, y))

    def sum(self, x: str) -> str:
        return self._op("aten.sum.default", (Ref(x),), ())

    def graph(self, loss: str) -> OpGraph:
        return OpGraph(
            name="by hand",
            tensors=self.tensors,
            ops=tuple(self.ops),
            parameters=tuple(self.parameters),
            buffers=(),
            inputs=tuple(self.inputs),
            outputs=(loss,),
            output_names=("loss",),
            loss=loss,
            modules={},
        )

    def _op(
        self,
        target: str,
        args: tuple[Any, ...],
        shape: tuple[int, ...],
        flops: int = 0,
        saved: tuple[str, ...] = (),
        internal: int = 0,
        name: str | None = None,
    ) -> str:
        name = name or f"{target.split('.')[1]}{len(self.ops)}"
        grad = any(self.tensors[arg.name].requires_grad for arg in args if isinstance(arg, Ref))
        self._tensor(name, shape, requires_grad=grad)
        self.ops.append(Op(name, target, args, {}, (name,), "", flops, saved, internal))
        return name

    def _tensor(self, name: str, shape: tuple[int, ...], *, requires_grad: bool) -> str:
        self.tensors[name] = Tensor(name, shape, self.dtype, requires_grad, name)
        return name
