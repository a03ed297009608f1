"""An exported program as an `OpGraph`: traced ops with inputs, parameters, buffers and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind

from graphs import ir
from graphs.interpret import fake_tensors
from graphs.leaves import has_values, parameters_of, with_leaves_of
from graphs.order import in_order_of_use
from graphs.trace import Tracer


def assemble(model: nn.Module, program: ExportedProgram, name: str) -> ir.OpGraph:
    """The graph of an exported model; names of ops are provisional, costs and blocks are missing."""
    return _Assembler(model, program, Tracer(fake_tensors())).graph(name)


class _Assembler:
    def __init__(self, model: nn.Module, program: ExportedProgram, tracer: Tracer) -> None:
        self._model = model
        self._program = program
        self._tracer = tracer
        self._first_path = {
            path: item.name for item in parameters_of(model) for path in (item.name, *item.aliases)
        }
        self._placeholders = {
            node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"
        }
        self._input_names = iter(program.call_spec.in_spec.child(1).context)
        self._declared: dict[str, torch.Tensor] = {}
        self._inputs: list[str] = []
        self._constants: list[ir.Buffer] = []

    def graph(self, name: str) -> ir.OpGraph:
        arguments = [self._argument(spec) for spec in self._program.graph_signature.input_specs]
        outputs = self._outputs(self._tracer.run(self._program.graph_module, arguments))
        trace = self._tracer.trace
        graph = ir.OpGraph(
            name=name,
            tensors=trace.tensors,
            ops=tuple(trace.ops),
            parameters=(),
            buffers=tuple(self._constants),
            inputs=tuple(self._inputs),
            outputs=tuple(outputs.values()),
            output_names=tuple(outputs),
            loss=_loss(outputs, trace.tensors),
            modules={},
        )
        return with_leaves_of(in_order_of_use(graph), self._model)

    def _argument(self, spec: InputSpec) -> Any:
        """What stands for an argument of the exported program: a fake tensor, or a plain value."""
        if spec.kind is InputKind.USER_INPUT:
            name = next(self._input_names)
            if isinstance(spec.arg, ConstantArgument):
                return spec.arg.value
            self._inputs.append(name)
            return self._declare(name, self._placeholders[spec.arg.name])
        path = str(spec.target)
        if spec.kind is InputKind.PARAMETER:
            value = self._model.get_parameter(path)
            return self._declare(self._first_path[path], value, requires_grad=value.requires_grad)
        if spec.kind is InputKind.BUFFER:
            return self._declare(path, self._model.get_buffer(path))
        if spec.kind is InputKind.CONSTANT_TENSOR:
            return self._constant(path)
        raise AssertionError(f"an exported model has no argument of kind {spec.kind}")

    def _declare(self, name: str, like: torch.Tensor, *, requires_grad: bool = False) -> torch.Tensor:
        if name not in self._declared:
            self._declared[name] = self._tracer.declare(name, like, requires_grad=requires_grad)
        return self._declared[name]

    def _constant(self, path: str) -> torch.Tensor:
        """A tensor from the model's code; equal ones are one, so that repeated layers share theirs."""
        value = self._program.constants[path]
        assert isinstance(value, torch.Tensor)
        value = value.detach()
        for known in self._constants:
            if _equal(known.value, value):
                return self._tracer.copy(self._declared[known.tensor])
        name = f"constant_{len(self._constants)}"
        self._constants.append(ir.Buffer(name, name, False, value if has_values(value) else None))
        return self._tracer.copy(self._declare(name, value))

    def _outputs(self, results: tuple[Any, ...]) -> dict[str, str]:
        """The tensors that the model returns, by key."""
        specs = self._program.graph_signature.output_specs
        users = [
            item for item, spec in zip(results, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT
        ]
        keys = dict(_keys(self._program.call_spec.out_spec.unflatten(range(len(users)))))
        return {
            keys[index]: self._tracer.name_of(item)
            for index, item in enumerate(users)
            if isinstance(item, torch.Tensor)
        }


def _equal(first: torch.Tensor | None, second: torch.Tensor) -> bool:
    if first is None or not has_values(second):
        return False
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)


def _keys(structure: Any, prefix: str = "") -> Iterator[tuple[int, str]]:
    """Position and key of every leaf of what the model returns."""
    if isinstance(structure, int):
        yield structure, prefix or "output"
        return
    if isinstance(structure, Mapping):
        items = [(str(key), value) for key, value in structure.items()]
    elif isinstance(structure, (tuple, list)):
        items = [(str(key), value) for key, value in enumerate(structure)]
    else:
        items = [(key, value) for key, value in vars(structure).items()]
    for key, value in items:
        yield from _keys(value, f"{prefix}.{key}" if prefix else key)


def _loss(outputs: Mapping[str, str], tensors: Mapping[str, ir.Tensor]) -> str | None:
    scalars = {
        key: name
        for key, name in outputs.items()
        if tensors[name].shape == () and tensors[name].requires_grad
    }
    if "loss" in scalars:
        return scalars["loss"]
    return next(iter(scalars.values())) if len(scalars) == 1 else None
