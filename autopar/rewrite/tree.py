"""Group the ops of a stage by the module tree of the original model.

A module becomes a class of the emitted program where that helps a reader: its ops stand together, and it is
more than a thin leaf. Leaves such as `nn.Linear` are used in place, and the modules that only hold the
repeated blocks are opened, so that the root reads as embedding, loop over blocks, head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from graphs.ir import ModuleInfo, Op, OpGraph, Ref

THIN = 4
"""A leaf module of at most this many ops is written in place."""

CALL = "module.call"
"""Target of a whole call of a torch module: `linear` and the addition of its bias are `self.fc(x)` again."""


@dataclass(frozen=True)
class Node:
    """One call of a module: its ops and the calls of its children, in order."""

    path: str
    items: tuple[Op | Node, ...]

    def ops(self) -> Iterator[Op]:
        for item in self.items:
            if isinstance(item, Node):
                yield from item.ops()
            else:
                yield item

    @property
    def attribute(self) -> str:
        """Its name in what contains it."""
        return self.path.rpartition(".")[2]

    @property
    def container(self) -> str:
        """The path of the module that contains it."""
        return self.path.rpartition(".")[0]


def build_tree(ops: tuple[Op, ...], graph: OpGraph, block_paths: Iterable[str]) -> Node:
    """The tree of one stage. Its root has the path `""`."""
    opened = _opened(ops, graph.modules, tuple(block_paths))
    while True:
        torn = _torn(ops, graph.modules, opened)
        if not torn:
            return _node("", tuple((op, _chain(op.module, graph.modules, opened)) for op in ops))
        opened |= torn


def call_leaves(ops: tuple[Op, ...], graph: OpGraph) -> tuple[Op, ...]:
    """Ops with every plain use of a `torch.nn` leaf turned into a call of it."""
    readers = Counter(name for op in ops for name in op.inputs)
    maker = {name: op for op in ops for name in op.outputs}
    whole: dict[str, Op] = {}
    absorbed: set[str] = set()
    for op in ops:
        info = graph.modules.get(op.module)
        owned = [name for name in op.inputs if _owner(graph, name, op.module) == op.module]
        if info is None or not info.defined_in.startswith("torch.nn"):
            continue
        if info.type_name == "Linear":
            if (
                op.target == "aten.linear.default"
                and op.inputs[1] in owned
                and not _has_bias(graph, op.module)
            ):
                whole[op.name] = _call(op, op.args[0], owned)
            elif op.target == "aten.add.Tensor" and len(owned) == 1 and not op.kwargs:
                product = next((maker[name] for name in op.inputs if name in maker), None)
                if (
                    product is not None
                    and product.target == "aten.linear.default"
                    and _owner(graph, product.inputs[1], op.module) == op.module
                    and readers[product.output] == 1
                ):
                    whole[op.name] = _call(op, product.args[0], (product.inputs[1], *owned))
                    absorbed.add(product.name)
        elif (info.type_name, op.target) == ("Embedding", "aten.embedding.default") and owned:
            whole[op.name] = _call(op, op.args[1], owned, padding_idx=(*op.args, -1)[2])
        elif (info.type_name, op.target) == ("LayerNorm", "aten.layer_norm.default") and len(owned) == 2:
            whole[op.name] = _call(op, op.args[0], owned, eps=(*op.args, 1e-5)[4])
    return tuple(whole.get(op.name, op) for op in ops if op.name not in absorbed)


def _call(op: Op, operand: Ref, parameters: Iterable[str], **settings: float) -> Op:
    """`self.leaf(operand)`, with the parameters that the leaf holds; `settings` are what its constructor must
    be told.
    """
    return replace(op, target=CALL, args=(operand, *map(Ref, parameters)), kwargs=settings)


def _owner(graph: OpGraph, tensor: str, module: str) -> str | None:
    """The module that holds a parameter; where it is tied, `module` if that is one of the holders."""
    parameter = graph.parameter_tensors.get(tensor)
    if parameter is None:
        return None
    owners = [name.rpartition(".")[0] for name in (parameter.name, *parameter.aliases)]
    return module if module in owners else owners[0]


def _has_bias(graph: OpGraph, module: str) -> bool:
    wanted = f"{module}.bias"
    return any(wanted in (parameter.name, *parameter.aliases) for parameter in graph.parameters)


def is_leaf(graph: OpGraph, path: str) -> bool:
    """Whether a module is one of torch's own without modules inside, such as a block that is just a
    `Linear`."""
    info = graph.modules.get(path)
    inside = any(other.startswith(f"{path}.") for other in graph.modules)
    return info is not None and info.defined_in.startswith("torch.nn") and not inside


def _opened(ops: tuple[Op, ...], modules: Mapping[str, ModuleInfo], block_paths: tuple[str, ...]) -> set[str]:
    """Modules that are written in place: the ancestors of blocks, torch's containers, and thin leaves."""
    inside = Counter(op.module for op in ops)
    parents = {parent for path in modules for parent in _prefixes(path)}
    opened = {parent for path in block_paths for parent in _prefixes(path)}
    for path, info in modules.items():
        if (
            path not in parents and (info.defined_in.startswith("torch.nn") or inside[path] <= THIN)
        ) or info.defined_in.startswith("torch.nn.modules.container"):
            opened.add(path)
    return opened - set(block_paths)


def _prefixes(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _chain(path: str, modules: Mapping[str, ModuleInfo], opened: set[str]) -> tuple[str, ...]:
    """The modules on the way to `path` that are classes, outermost first, without the root."""
    names = path.split(".") if path else []
    chain = (".".join(names[: depth + 1]) for depth in range(len(names)))
    return tuple(step for step in chain if step in modules and step not in opened)


def _torn(ops: tuple[Op, ...], modules: Mapping[str, ModuleInfo], opened: set[str]) -> set[str]:
    """Modules whose ops do not stand together, so that no single call can stand for them."""
    torn: set[str] = set()
    closed: set[str] = set()
    current: tuple[str, ...] = ()
    for op in ops:
        chain = _chain(op.module, modules, opened)
        closed.update(path for path in current if path not in chain)
        torn.update(path for path in chain if path in closed)
        current = chain
    return torn


def _node(path: str, ops: tuple[tuple[Op, tuple[str, ...]], ...]) -> Node:
    items: list[Op | Node] = []
    position = 0
    while position < len(ops):
        op, chain = ops[position]
        if not chain:
            items.append(op)
            position += 1
            continue
        stop = position
        while stop < len(ops) and ops[stop][1][:1] == chain[:1]:
            stop += 1
        items.append(_node(chain[0], tuple((inner, rest[1:]) for inner, rest in ops[position:stop])))
        position = stop
    return Node(path, tuple(items))
