"""The `__init__` of a class: what it holds, under the names of the original model.

Leaves of `torch.nn` are themselves again, with local sizes; what fits none of them is a plain holder of
parameters. The containers of the original model become `Container`s, or `nn.ModuleDict`s where the program
loops over them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch

from autopar.rewrite.batch_norm import keeps_statistics
from autopar.rewrite.context import ProgramContext, access, below
from autopar.rewrite.expressions import literal, tuple_of
from autopar.rewrite.tree import CALL, Node
from graphs.ir import Buffer, Op

LITERAL_LENGTH = 60
"""The longest text of a buffer that is written into the source; what is longer is saved beside it."""

Tree = dict[str, "str | Tree"]
"""Members by name: the constructor of a module, or the members of a container."""


class Members:
    """Writes what the classes of a program hold, and keeps the buffers that are too large to be written."""

    def __init__(self, context: ProgramContext) -> None:
        self.context = context
        self.graph = context.graph
        self.buffers = {buffer.tensor: buffer for buffer in self.graph.buffers}
        self.large_buffers: dict[str, torch.Tensor] = {}

    def lines(
        self,
        node: Node,
        held: Mapping[str, str],
        children: Mapping[str, str],
        ties: Mapping[str, str],
        looped: Collection[str],
    ) -> list[str]:
        """The statements that build the members of one class.

        `held` are the parameters and buffers under it by path, `children` the constructors of its child
        classes by path, `ties` the paths that stand for another one, `looped` the containers that its
        `forward` loops over.
        """
        ops = tuple(node.ops())
        leaves: dict[str, dict[str, str]] = {}
        buffers: list[tuple[str, str]] = []
        for path, tensor in held.items():
            owner, _, attribute = below(path, node.path).rpartition(".")
            if tensor in self.buffers:
                buffers.append((owner, self._buffer(self.buffers[tensor], owner, attribute)))
            elif owner or path not in ties:
                leaves.setdefault(owner, {})[attribute] = tensor
        lines = []
        for attribute, tensor in leaves.pop("", {}).items():
            shape = self._shape(tensor) or "()"
            lines.append(f"self.{attribute} = nn.Parameter(torch.empty({shape}{self.context.dtype(tensor)}))")
        constructors = {
            owner: self._leaf(f"{node.path}.{owner}" if node.path else owner, tensors, ops)
            for owner, tensors in leaves.items()
        }
        for op in node.items:
            if isinstance(op, Op) and keeps_statistics(op):
                owner = below(op.module, node.path)
                constructors[owner] = self._batch_norm(op, leaves.get(owner, {}))
        constructors |= {below(path, node.path): constructor for path, constructor in children.items()}
        for owner, _ in buffers:
            if owner and not any(path.startswith(f"{owner}.") for path in constructors):
                constructors.setdefault(owner, "Container()")
        lines += _build("self", _tree(constructors), looped)
        lines += [line for _, line in buffers]
        lines += [
            f"{access(below(path, node.path))}.requires_grad_(False)"
            for path, tensor in held.items()
            if self._is_frozen(tensor) and path not in ties
        ]
        for path, first in ties.items():
            lines.append(f"{access(below(path, node.path))} = {access(below(first, node.path))}  # tied")
        return lines

    def _is_frozen(self, tensor: str) -> bool:
        return tensor not in self.buffers and not self.graph.tensors[tensor].requires_grad

    def _leaf(self, path: str, tensors: Mapping[str, str], ops: Sequence[Op]) -> str:
        """The constructor of a leaf: torch's own where its parameters are just those, else a plain holder."""
        info = self.graph.modules.get(path)
        if info is not None and info.defined_in.startswith("torch.nn") and "weight" in tensors:
            call = next((op for op in ops if op.module == path and op.target == CALL), None)
            writer = self._writers().get(info.type_name)
            written = writer(tensors, call) if writer is not None else None
            if written is not None:
                return f"nn.{info.type_name}({written}{self.context.dtype(tensors['weight'])})"
        shapes = ", ".join(
            f"{name}={tuple_of(self.context.sizes(tensor))}" for name, tensor in tensors.items()
        )
        return f"Parameters({shapes}{self.context.dtype(next(iter(tensors.values())))})"

    def _writers(self) -> Mapping[str, Callable[[Mapping[str, str], Op | None], str | None]]:
        return {"Linear": self._linear, "Embedding": self._embedding, "LayerNorm": self._layer_norm}

    def _linear(self, tensors: Mapping[str, str], call: Op | None) -> str | None:
        weight, bias = tensors["weight"], tensors.get("bias")
        if tensors.keys() - {"weight", "bias"}:
            return None
        if bias is not None and self.graph.tensors[bias].shape != self.graph.tensors[weight].shape[:1]:
            return None  # the bias is not split as the rows of the weight are
        rows, columns = self.context.sizes(weight)
        return f"{columns}, {rows}" if bias is not None else f"{columns}, {rows}, bias=False"

    def _embedding(self, tensors: Mapping[str, str], call: Op | None) -> str | None:
        padding = -1 if call is None else call.kwargs["padding_idx"]
        return self._shape(tensors["weight"]) + (f", padding_idx={padding}" if padding >= 0 else "")

    def _layer_norm(self, tensors: Mapping[str, str], call: Op | None) -> str | None:
        if call is None:
            return None
        return f"{self._shape(tensors['weight'])}, eps={call.kwargs['eps']}"

    def _batch_norm(self, op: Op, tensors: Mapping[str, str]) -> str:
        x, weight = op.args[0].name, op.args[1]
        channels = self.context.sizes(x)[1]
        settings = f"eps={op.args[7]}, momentum={op.args[6]}"
        settings += "" if weight is not None else ", affine=False"
        settings += self.context.dtype(x)
        for name, option in (("weight", "num_weights"), ("bias", "num_biases")):
            size = self._shape(tensors[name]) if name in tensors else channels
            settings += f", {option}={size}" if size != channels else ""
        return f"BatchNorm({channels}, {settings})"

    def _shape(self, tensor: str) -> str:
        return ", ".join(self.context.sizes(tensor))

    def _buffer(self, buffer: Buffer, owner: str, attribute: str) -> str:
        holder = access(owner)
        persistence = "" if buffer.persistent else ", persistent=False"
        return f'{holder}.register_buffer("{attribute}", {self._value(buffer)}{persistence})'

    def _value(self, buffer: Buffer) -> str:
        """The expression of a buffer's value: on the cpu even where everything else is built on the meta
        device."""
        meta = self.graph.tensors[buffer.tensor]
        value = buffer.value
        shape = f"{literal(tuple(meta.shape), {})}"
        if value is None:
            return f'torch.zeros({shape}, dtype={meta.dtype}, device="cpu")'
        if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            number = literal(value.flatten()[0].item(), {})
            return f'torch.full({shape}, {number}, dtype={meta.dtype}, device="cpu")'
        numbers = literal(value.tolist(), {}) if value.numel() < LITERAL_LENGTH else ""
        if 0 < len(numbers) <= LITERAL_LENGTH:
            return f'torch.tensor({numbers}, dtype={meta.dtype}, device="cpu")'
        self.large_buffers[buffer.name] = value
        return f'saved_tensor("{buffer.name}")'


def _tree(constructors: Mapping[str, str]) -> Tree:
    """Members by name. A module that holds both parameters of its own and others inside has its own
    constructor under `""`.
    """
    tree: Tree = {}
    for path in sorted(constructors, key=lambda path: path.count(".")):
        *containers, attribute = path.split(".")
        branch = tree
        for container in containers:
            inner = branch.setdefault(container, {})
            if isinstance(inner, str):
                inner = branch[container] = {"": inner}
            branch = inner
        branch[attribute] = constructors[path]
    return tree


def _build(owner: str, tree: Tree, looped: Collection[str]) -> Iterator[str]:
    """Statements that build a tree of members; containers in `looped` are built from ranges even for one
    member.
    """
    for name, member in tree.items():
        target = f'{owner}["{name}"]' if name.isdigit() else f"{owner}.{name}"
        if isinstance(member, str):
            yield f"{target} = {member}"
            continue
        constructors = {key: each for key, each in member.items() if isinstance(each, str)}
        numbered = all(key.isdigit() for key in member)
        if numbered and len(constructors) == len(member):
            yield f"{target} = {_container(constructors, target in looped)}"
        else:
            own = constructors.get("", "Container()")
            yield f"{target} = {own}"
            yield from _build(target, {key: each for key, each in member.items() if key}, looped)


def _container(members: Mapping[str, str], is_looped: bool) -> str:
    """A container, runs of the same constructor as a comprehension over their range."""
    kind = "nn.ModuleDict" if is_looped else "Container"
    runs: list[tuple[int, int, str]] = []
    for key, constructor in members.items():
        number = int(key)
        if runs and runs[-1][1] == number and runs[-1][2] == constructor:
            runs[-1] = (runs[-1][0], number + 1, constructor)
        else:
            runs.append((number, number + 1, constructor))
    if len(runs) == 1 and (len(members) > 1 or is_looped):
        return f"{kind}({_run(*runs[0])})"
    items = [
        f'"{start}": {constructor}' if stop - start == 1 else f"**{_run(start, stop, constructor)}"
        for start, stop, constructor in runs
    ]
    return f"{kind}({{{', '.join(items)}}})"


def _run(start: int, stop: int, constructor: str) -> str:
    span = f"{stop}" if start == 0 else f"{start}, {stop}"
    return f"{{str(i): {constructor} for i in range({span})}}"
