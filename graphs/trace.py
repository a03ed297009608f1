"""From an exported program to a straight line of functional operators.

The program is interpreted on fake tensors. Each node is brought into canonical form (`graphs.forms`),
in-place operators become functional ones (`graphs.functionalize`), and whatever is then really called is
recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx import GraphModule, Node

from graphs import ir
from graphs.canonical import Bound, bind, unbind
from graphs.errors import DATA_DEPENDENT_ADVICE, CaptureError, DataDependentError, UnsupportedOpError
from graphs.forms import canonical_form
from graphs.functionalize import Versions, functional_form, is_in_place
from graphs.order import module_of

_PURE_ASSERTIONS = frozenset({"aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar"})
_INLINED_REGIONS = frozenset(
    {"wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint"}
)


@dataclass
class Trace:
    """The recorded operators; names are provisional, every tensor still owns its storage, and modules are
    calls of modules (`graphs.order`)."""

    ops: list[ir.Op] = field(default_factory=list)
    tensors: dict[str, ir.Tensor] = field(default_factory=dict)


class Tracer:
    """Interprets one program and records what it calls."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.trace = Trace()
        self.versions = Versions(self)
        self._fake_mode = fake_mode
        self._names: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []
        self._module = ""
        self._node: Node | None = None
        self._grad_enabled = True
        self._detached: dict[int, torch.Tensor] = {}

    def declare(self, name: str, like: torch.Tensor, *, requires_grad: bool) -> torch.Tensor:
        """A fresh fake tensor that stands for an input, a parameter or a buffer."""
        with self._fake_mode:
            fake = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, requires_grad=requires_grad
            )
        self._record_tensor(name, fake)
        return fake

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name under which a traced tensor is recorded."""
        return self._names[id(tensor)]

    def run(self, program: GraphModule, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Interpret a graph module; returns its outputs."""
        env: dict[Node, Any] = {}
        remaining = iter(arguments)

        def read(node: Node) -> Any:
            value = env[node]
            return self.versions.current(value) if isinstance(value, torch.Tensor) else value

        for node in program.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(remaining)
            elif node.op == "get_attr":
                env[node] = getattr(program, node.target)
            elif node.op == "output":
                return tuple(torch.fx.map_arg(node.args[0], read))
            elif node.op == "call_function":
                self._node = node
                self._module = _call_path(node) if "nn_module_stack" in node.meta else self._module
                with self._explained(node):
                    args = torch.fx.map_arg(node.args, read)
                    kwargs = torch.fx.map_arg(node.kwargs, read)
                    env[node] = self._interpret(node, args, dict(kwargs))
            else:
                raise AssertionError(f"an exported graph has no {node.op} nodes")
        raise AssertionError("an exported graph ends with its output")

    def emit(self, target: OpOverload, /, *args: Any, **kwargs: Any) -> Any:
        """Bring one functional call into canonical form and record it; returns its fake result."""
        return canonical_form(self, bind(target, args, kwargs))

    def record(self, call: Bound) -> Any:
        """Call an operator on fake tensors and record the call as it is."""
        if not self._grad_enabled:
            call = call.map_tensors(self._detach)
        args, kwargs = unbind(call)
        with self._fake_mode:
            result = call.target(*args, **kwargs)
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        if any(map(_is_symbolic, results)):
            raise DataDependentOutputException(call.target)
        if len(results) == 1 and id(results[0]) in self._names:
            return result
        if not all(isinstance(item, torch.Tensor) for item in results):
            raise UnsupportedOpError(f"{call.target} returns something that is not a tensor")
        name = f"op{len(self.trace.ops)}"
        outputs = [f"{name}_{index}" for index in range(len(results))]
        self._register(name, call, outputs, args, kwargs)
        for output, item in zip(outputs, results, strict=True):
            self._record_tensor(output, item)
        self.versions.note_views(call, results)
        return result

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same value as a tensor of its own: no op, for values in the graph never change."""
        with self._fake_mode:
            fresh = torch.ops.aten.alias.default(tensor)
        assert isinstance(fresh, torch.Tensor)
        self._alive.append(fresh)
        self._names[id(fresh)] = self.name_of(tensor)
        return fresh

    def _register(self, name: str, call: Bound, outputs: Sequence[str], args: Any, kwargs: Any) -> None:
        def as_refs(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return ir.Ref(self.name_of(value))
            if isinstance(value, (tuple, list)):
                return type(value)(as_refs(item) for item in value)
            return value

        named = {key: as_refs(value) for key, value in kwargs.items()}
        self.trace.ops.append(
            ir.Op(
                name,
                str(call.target),
                tuple(as_refs(item) for item in args),
                named,
                tuple(outputs),
                self._module,
            )
        )

    def _record_tensor(self, name: str, tensor: torch.Tensor) -> None:
        self._alive.append(tensor)  # an id is unique only while the tensor lives
        self._names[id(tensor)] = name
        self.trace.tensors[name] = ir.Tensor(
            name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad, name
        )

    def _detach(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a region without gradients sees of a tensor that has one."""
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in self._detached:
            self._grad_enabled = True
            self._detached[id(tensor)] = self.record(bind(torch.ops.aten.detach.default, (tensor,), {}))
            self._grad_enabled = False
        return self._detached[id(tensor)]

    def _interpret(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = node.target
        if isinstance(target, OpOverload):
            if f"{target.namespace}.{target._opname}" in _PURE_ASSERTIONS:
                return None
            if is_in_place(target):
                return functional_form(self, bind(target, args, kwargs))
            return self.emit(target, *args, **kwargs) if node.users else None
        name = getattr(target, "__name__", str(target))
        if name == "getitem":
            return args[0][args[1]]
        if name in _INLINED_REGIONS:
            return self._inline(name, args, kwargs)
        raise UnsupportedOpError(
            f"the operator {name} has no functional form in an operator graph",
            advice="write this part of forward with ordinary torch operators",
        )

    def _inline(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        position = next(index for index, item in enumerate(args) if isinstance(item, GraphModule))
        if name == "wrap_with_autocast" and args[2]:
            raise UnsupportedOpError(
                f"forward enters torch.autocast({args[0]!r}, {args[1]})",
                advice="build the model in the wanted dtype instead, such as model.to(torch.bfloat16)",
            )
        before = self._grad_enabled
        if name == "wrap_with_set_grad_enabled":
            self._grad_enabled = bool(args[0])
        try:
            return self.run(args[position], args[position + 1 :])
        finally:
            self._grad_enabled = before

    @contextmanager
    def _explained(self, node: Node) -> Iterator[None]:
        try:
            yield
        except CaptureError as error:
            if error.module is not None:
                raise
            raise type(error)(error.problem, **self._where(node), advice=error.advice) from error
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise DataDependentError(
                f"the result of {node.target} depends on the values of its operands",
                **self._where(node),
                advice=DATA_DEPENDENT_ADVICE,
            ) from error
        except Exception as error:  # operators raise what they like; the culprit and the reason are told
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            advice = "write this part of forward with operators that have a fake implementation"
            raise UnsupportedOpError(
                f"{node.target} does not run on fake tensors: {reason}", **self._where(node), advice=advice
            ) from error

    def _where(self, node: Node) -> Mapping[str, str | None]:
        return {"module": module_of(self._module), "source": source_line(node)}


def _is_symbolic(result: Any) -> bool:
    """Whether a result is a number, or has a size, that only the values of tensors tell."""
    sizes = result.shape if isinstance(result, torch.Tensor) else (result,)
    return any(isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes)


def source_line(node: Node) -> str | None:
    """The innermost line of the model's own code that led to a node, as `file:line: text`."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s+(.*)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/" not in frame[0]]
    return "{}:{}: {}".format(*own[-1]) if own else None


def _call_path(node: Node) -> str:
    """Path of the innermost module of a node, with torch's mark of a second call, `@1`, and of later ones."""
    stack = node.meta["nn_module_stack"]
    if not stack:
        return ""
    key, (path, _) = next(reversed(stack.items()))
    return module_of(path) + "".join(re.findall(r"@\d+$", key))
