"""An exported program as an `OpGraph`: the traced ops with the model's inputs, parameters, buffers and outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind

from graphs import ir
from graphs.export import has_values
from graphs.trace import Tracer


def assemble(model: nn.Module, program: ExportedProgram, name: str) -> ir.OpGraph:
    """The graph of an exported model; names of ops are provisional, costs and blocks are missing."""
    return _Assembler(model, program, Tracer(FakeTensorMode())).graph(name)


class _Assembler:
    def __init__(self, model: nn.Module, program: ExportedProgram, tracer: Tracer) -> None:
        self._model = model
        self._program = program
        self._tracer = tracer
        self._aliases = _parameter_paths(model)
        self._input_names = iter(program.call_spec.in_spec.child(1).context)
        self._declared: dict[str, torch.Tensor] = {}
        self._inputs: list[str] = []
        self._parameters: list[ir.Parameter] = []
        self._buffers: list[ir.Buffer] = []

    def graph(self, name: str) -> ir.OpGraph:
        arguments = [self._argument(spec) for spec in self._program.graph_signature.input_specs]
        self._declare_unused_parameters()
        results = self._tracer.run(self._program.graph_module, arguments)
        outputs = self._outputs(results)
        trace = self._tracer.trace
        return ir.OpGraph(
            name=name,
            tensors=trace.tensors,
            ops=tuple(trace.ops),
            parameters=tuple(self._parameters),
            buffers=tuple(self._buffers),
            inputs=tuple(self._inputs),
            outputs=tuple(outputs.values()),
            output_names=tuple(outputs),
            loss=_loss(outputs, trace.tensors),
            modules={path: _module_info(path, module) for path, module in self._model.named_modules()},
        )

    def _argument(self, spec: InputSpec) -> Any:
        if spec.kind is InputKind.USER_INPUT:
            name = next(self._input_names)
            if isinstance(spec.arg, ConstantArgument):
                return spec.arg.value
            self._inputs.append(name)
            return self._declare(name, self._placeholder(spec.arg.name))
        target = str(spec.target)
        if spec.kind is InputKind.PARAMETER:
            return self._parameter(target)
        if spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            return self._buffer(target, persistent=bool(spec.persistent))
        raise AssertionError(f"an exported model has no argument of kind {spec.kind}")

    def _placeholder(self, name: str) -> torch.Tensor:
        node = next(node for node in self._program.graph.nodes if node.name == name)
        value = node.meta["val"]
        assert isinstance(value, torch.Tensor)
        return value

    def _declare(self, name: str, like: torch.Tensor, *, requires_grad: bool = False) -> torch.Tensor:
        if name not in self._declared:
            self._declared[name] = self._tracer.declare(name, like, requires_grad=requires_grad)
        return self._declared[name]

    def _parameter(self, path: str) -> torch.Tensor:
        first = next(first for first, others in self._aliases.items() if path in (first, *others))
        value = self._model.get_parameter(path)
        if first not in self._declared:
            self._parameters.append(ir.Parameter(first, first, self._aliases[first]))
        return self._declare(first, value, requires_grad=value.requires_grad)

    def _declare_unused_parameters(self) -> None:
        """Also parameters that forward does not read are trained state, and the graph lists all in the model's order."""
        for path in self._aliases:
            self._parameter(path)
        order = {path: index for index, path in enumerate(self._aliases)}
        self._parameters.sort(key=lambda parameter: order[parameter.name])

    def _buffer(self, path: str, *, persistent: bool) -> torch.Tensor:
        own = dict(self._model.named_buffers(remove_duplicate=False)).get(path)
        value = self._program.constants[path] if own is None else own
        assert isinstance(value, torch.Tensor)
        if path not in self._declared:
            known = value.detach() if has_values(value) else None
            self._buffers.append(ir.Buffer(path, path, persistent, known))
        return self._declare(path, value)

    def _outputs(self, results: tuple[Any, ...]) -> dict[str, str]:
        """The tensors that the model returns, by key."""
        specs = self._program.graph_signature.output_specs
        users = [item for item, spec in zip(results, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
        keys = dict(_keys(self._program.call_spec.out_spec.unflatten(range(len(users)))))
        return {
            keys[index]: self._tracer.name_of(item)
            for index, item in enumerate(users)
            if isinstance(item, torch.Tensor)
        }


def _parameter_paths(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The other paths of each parameter, by its first path."""
    first: dict[int, str] = {}
    paths: dict[str, tuple[str, ...]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        leader = first.setdefault(id(parameter), path)
        paths[leader] = (*paths.get(leader, ()), *([] if path == leader else [path]))
    return paths


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
    scalars = {key: name for key, name in outputs.items() if tensors[name].shape == () and tensors[name].requires_grad}
    if "loss" in scalars:
        return scalars["loss"]
    return next(iter(scalars.values())) if len(scalars) == 1 else None


def _module_info(path: str, module: nn.Module) -> ir.ModuleInfo:
    return ir.ModuleInfo(path, type(module).__name__, type(module).__module__)
