"""The operator graph: what a model computes, as frozen values.

An `OpGraph` is a straight line of `Op`s over named tensors in single-assignment form: no in-place operation,
no control flow, every shape a plain integer. It is what the planner prices, cuts and rewrites. Arguments of
an op are ordinary Python values in which a tensor stands as `Ref(name)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch

RowOrder = Literal["first", "own", "counts"]
"""How a tensor has the rows of a routing: in the order of the batch, in an order of their own, or only how
many there are of a kind."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor inside the arguments of an op, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Tensor:
    """One value of the graph.

    `storage` names the tensor that owns the memory: a view has the storage of its base, everything else its
    own. `requires_grad` is true where autograd tracks the value, so where it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    storage: str

    def renamed(self, name: str, storage: str) -> Tensor:
        """The same value under another name, with the memory of another tensor."""
        return Tensor(name, self.shape, self.dtype, self.requires_grad, storage)

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Op:
    """One operator call.

    Attributes:
        name: unique in the graph.
        target: the ATen overload, such as `aten.linear.default`, or a collective of a localized graph.
        args, kwargs: values with `Ref`s in place of tensors.
        outputs: names of the tensors it makes (one for most ops; `split` makes several).
        module: path of the module whose forward called it, `""` for the root.
        flops: floating-point operations of the forward, as `torch.utils.flop_counter` counts them.
        saved: storages (tensor names) that autograd keeps for this op's backward.
        saved_internal_bytes: bytes autograd keeps that are no tensor of the graph (log-sum-exp of attention,
            masks).
        window: how many keys each query of an attention attends to at most, where its mask says so.
        rows: of an op of a routing, which puts rows into an order of their own and back (`graphs.routing`),
            in which order each operand and then each result has them along its first dimension; None where it
            has none.
        inputs: names of the tensor arguments, in order, repeated where an argument repeats.
    """

    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[str, ...]
    module: str
    flops: int = 0
    saved: tuple[str, ...] = ()
    saved_internal_bytes: int = 0
    window: int | None = None
    rows: tuple[RowOrder | None, ...] | None = None
    inputs: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(refs_in(self.args) + refs_in(self.kwargs)))

    def with_tensors(
        self, rename: Callable[[str], str], *, name: str | None = None, module: str | None = None
    ) -> Op:
        """The op that does the same to other tensors, under a name and in a module of its own if they are
        given."""

        def renamed(tensor: str) -> Ref:
            return Ref(rename(tensor))

        return Op(
            name or self.name,
            self.target,
            map_refs(self.args, renamed),
            map_refs(self.kwargs, renamed),
            tuple(map(rename, self.outputs)),
            self.module if module is None else module,
            self.flops,
            tuple(map(rename, self.saved)),
            self.saved_internal_bytes,
            self.window,
            self.rows,
        )

    @property
    def output(self) -> str:
        """The name of its only result."""
        assert len(self.outputs) == 1, f"{self.name} has {len(self.outputs)} results"
        return self.outputs[0]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model.

    `name` is its first path in `named_parameters()`; `aliases` are the other paths of a tied parameter. Its
    tensor in the graph has the name `tensor`.
    """

    name: str
    tensor: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer or lifted constant; `value` is None only where the model was built on the meta device."""

    name: str
    tensor: str
    persistent: bool
    value: torch.Tensor | None = field(compare=False, default=None)


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """A module of the original tree: its class (`LlamaAttention`), and the module that defines that class."""

    path: str
    type_name: str
    defined_in: str


@dataclass(frozen=True, slots=True)
class Block:
    """One instance of a repeated block: ops `[start, stop)` of the graph, all under module `path`.

    Instances of one `block_class` are isomorphic: op `start + i` of each does the same to corresponding
    tensors. Those that are to be planned apart all the same have different `form`s.
    """

    path: str
    block_class: int
    start: int
    stop: int
    form: int = 0

    @property
    def kind(self) -> tuple[int, int]:
        """Blocks of one kind are planned alike."""
        return self.block_class, self.form


@dataclass(frozen=True)
class OpGraph:
    """A captured model.

    `inputs` are the user's tensors in the order of the call, by their argument names; `outputs` the tensors
    the model returns (`output_names` says under which key); `loss` the scalar among them that training
    minimises, or None. `modules` maps every module path to its class.
    """

    name: str
    tensors: Mapping[str, Tensor]
    ops: tuple[Op, ...]
    parameters: tuple[Parameter, ...]
    buffers: tuple[Buffer, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_names: tuple[str, ...]
    loss: str | None
    modules: Mapping[str, ModuleInfo]
    blocks: tuple[Block, ...] = ()

    @cached_property
    def producer(self) -> Mapping[str, int]:
        """Index of the op that makes each tensor; inputs, parameters and buffers are absent."""
        return {name: index for index, op in enumerate(self.ops) for name in op.outputs}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[int, ...]]:
        """Indices of the ops that read each tensor, ascending, each once."""
        readers: dict[str, list[int]] = {name: [] for name in self.tensors}
        for index, op in enumerate(self.ops):
            for name in dict.fromkeys(op.inputs):
                readers[name].append(index)
        return {name: tuple(indices) for name, indices in readers.items()}

    @cached_property
    def parameter_tensors(self) -> Mapping[str, Parameter]:
        """Parameters by the name of their tensor."""
        return {parameter.tensor: parameter for parameter in self.parameters}

    @cached_property
    def representative(self) -> tuple[int, ...]:
        """For each op, the index of the corresponding op in the first block of its kind (itself outside)."""
        first: dict[tuple[int, int], Block] = {}
        result = list(range(len(self.ops)))
        for block in self.blocks:
            leader = first.setdefault(block.kind, block)
            for offset in range(block.stop - block.start):
                result[block.start + offset] = leader.start + offset
        return tuple(result)

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, a tied one counted once."""
        return sum(self.tensors[parameter.tensor].num_elements for parameter in self.parameters)

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward."""
        return sum(op.flops for op in self.ops)


def refs_in(value: Any) -> list[str]:
    """Names of the tensors inside nested arguments, in order."""
    if isinstance(value, Ref):
        return [value.name]
    if not isinstance(value, (tuple, list)):
        value = value.values() if isinstance(value, (dict, Mapping)) else ()
    found: list[str] = []
    for item in value:
        if type(item) is Ref:
            found.append(item.name)
        elif type(item) not in _PLAIN:
            found += refs_in(item)
    return found


def map_refs(value: Any, function: Callable[[str], Any]) -> Any:
    """Nested arguments with every `Ref(name)` replaced by `function(name)`."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Ref):
        return function(value.name)
    if isinstance(value, (tuple, list)):
        return type(value)([map_refs(item, function) for item in value])
    if isinstance(value, (dict, Mapping)):  # a dict, as nearly all are, is quicker to tell
        return {key: map_refs(item, function) for key, item in value.items()}
    return value


_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype})
"""Types of most arguments: they hold no tensor."""
