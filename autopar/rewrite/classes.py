"""Classes of the emitted model: one for each distinct module, however often it is repeated.

Two modules are the same class when their source is the same. A class is printed from its ops with names of
its own, so the layers of a model, which do the same to different tensors, come out letter by letter alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from autopar.rewrite.body import Body
from autopar.rewrite.context import ProgramContext, prefix
from autopar.rewrite.holding import Holding
from autopar.rewrite.loops import LoopFinder
from autopar.rewrite.members import Members
from autopar.rewrite.naming import RESERVED, Names, fresh, makers
from autopar.rewrite.origins import distinction, docstring
from autopar.rewrite.stages import Stage
from autopar.rewrite.tree import Node


@dataclass(frozen=True)
class PrintedClass:
    """A class of the program; `needs_mesh` says whether its `__init__` is told the mesh."""

    name: str
    text: str
    needs_mesh: bool


@dataclass(frozen=True)
class Instance:
    """A module of the program: its class, the tensors it takes and gives, and its range of layers if it has
    one.
    """

    printed: PrintedClass
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: str = ""

    @property
    def constructor(self) -> str:
        """The expression that makes it inside another class."""
        return f"{self.printed.name}({'mesh' if self.printed.needs_mesh else ''})"

    @property
    def factory(self) -> str:
        """The function of the mesh that makes a stage: the class, told its range of layers where it wants
        one.
        """
        name = self.printed.name
        return f"functools.partial({name}, layers={self.layers})" if self.layers else name


class ClassPrinter:
    """Prints the classes of one stage after another; equal ones are printed once."""

    def __init__(self, context: ProgramContext) -> None:
        self.context = context
        self.members = Members(context)
        self._classes: dict[str, PrintedClass] = {}
        self._origins: dict[str, dict[str, None]] = {}

    @property
    def large_buffers(self) -> Mapping[str, torch.Tensor]:
        """Buffers that the source loads from beside it, by name."""
        return self.members.large_buffers

    def stage(self, root: Node, stage: Stage, name: str) -> Instance:
        """The root class of a stage, and with it every class it needs."""
        return _StagePrinter(self, root, stage).root(name)

    def sources(self) -> list[str]:
        """The source of every class, each after those it needs."""
        return [
            "\n    ".join(
                [f"class {printed.name}({_base(printed.text)}):", *docstring(self._origins[printed.name])]
            )
            + f"\n\n{printed.text}\n"
            for printed in self._classes.values()
        ]

    def named(self, name: str, text: str, needs_mesh: bool, origin: str) -> PrintedClass:
        """The class with this source: an earlier one if there is one, else a new one under a free name, which
        tells it from one of another place."""
        printed = self._classes.get(text)
        if printed is None:
            taken = {other.name for other in self._classes.values()} | RESERVED
            if name in self._origins:
                name += distinction(origin, self._origins[name])
            printed = self._classes[text] = PrintedClass(fresh(name, taken, separator=""), text, needs_mesh)
        self._origins.setdefault(printed.name, {})[origin] = None
        return printed


def _base(text: str) -> str:
    """What a class derives from: one with numbered members of its own, as a `Sequential` has, is a
    `Container`."""
    return "Container" if 'self["' in text else "nn.Module"


class _StagePrinter:
    """Prints the classes of one stage."""

    def __init__(self, printer: ClassPrinter, root: Node, stage: Stage) -> None:
        self.printer = printer
        self.context = printer.context
        self.graph = printer.context.graph
        self.tree = root
        self.stage = stage
        self.ops = tuple(root.ops())
        self.is_whole = stage.num_stages == 1
        self.holding = Holding(self.graph, self.ops, is_whole=self.is_whole)
        self.maker = makers((*self.graph.ops, *self.ops))
        self.names = Names(self.graph, self.maker, {name: name for name in self.graph.inputs})
        self.readers: dict[str, list[str]] = {}
        for op in self.ops:
            for read in op.inputs:
                self.readers.setdefault(read, []).append(op.name)

    def root(self, name: str) -> Instance:
        """The class of the stage itself."""
        stage, result = self.stage, _returns(self.stage.sends)
        arguments = self._argument_names(stage.receives)
        if self.is_whole and RESERVED.isdisjoint(stage.batch):
            arguments |= {name: name for name in stage.batch}  # the names by which it is called
            head = [_signature(arguments.values(), result)]
        else:
            batch = "**batch: Tensor" if self.is_whole else "batch: dict[str, Tensor]"
            head = [_signature(arguments.values(), result, more=batch)]
            arguments = self._argument_names((*stage.receives, *stage.batch))
            head += [f'    {arguments[name]} = batch["{name}"]' for name in stage.batch]
        origin = "" if self.is_whole else str(stage.index)
        return self._print(self.tree, name, arguments, stage.sends, head, origin)

    def _child(self, node: Node) -> Instance:
        inputs, outputs = self._inputs(node), self._outputs(node)
        arguments = self._argument_names(inputs)
        head = [_signature(arguments.values(), _returns(outputs))]
        if node.path in self.context.block_paths and self.context.recomputing.policies:
            head.insert(0, "@recomputable")
        return self._print(node, self.graph.modules[node.path].type_name, arguments, outputs, head, node.path)

    def _print(
        self,
        node: Node,
        name: str,
        arguments: Mapping[str, str],
        outputs: tuple[str, ...],
        head: Sequence[str],
        origin: str,
    ) -> Instance:
        children = {item.path: self._child(item) for item in node.items if isinstance(item, Node)}
        body = self._body(node, children, arguments, outputs)
        members = self.printer.members.lines(
            node,
            dict(self.holding.directly_under(node)),
            {path: child.constructor for path, child in children.items()},
            self.holding.ties(node),
            body.looped(),
        )
        is_root = node is self.tree
        members, layers = _with_layer_range(members) if is_root and not self.is_whole else (members, "")
        needs_mesh = (
            is_root or bool(body.axes()) or any(child.printed.needs_mesh for child in children.values())
        )
        groups = [f'self.{axis} = mesh.get_group("{self.context.axis_names[axis]}")' for axis in body.axes()]
        buffers = re.findall(r'^self\.register_buffer\("(\w+)"', "\n".join(members), re.MULTILINE)
        annotations = [*(f"{name}: Tensor" for name in buffers), ""] if buffers else []
        constructor = [*annotations, *_constructor([*groups, *members], needs_mesh, bool(layers))]
        lines = [*constructor, *head, *(f"    {line}" for line in body.lines())]
        text = "\n".join(f"    {line}" if line else "" for line in lines)
        printed = self.printer.named(name, text, needs_mesh, self._origin(node, origin))
        return Instance(printed, tuple(arguments), outputs, layers)

    def _origin(self, node: Node, place: str) -> str:
        """Which module of the original model this is: its path, or the stage, and its class."""
        info = self.graph.modules.get(node.path)
        return f"{place}\n{info.type_name if info is not None else self.graph.name}"

    def _body(
        self,
        node: Node,
        children: Mapping[str, Instance],
        arguments: Mapping[str, str],
        outputs: tuple[str, ...],
    ) -> Body:
        made = {name for op in node.ops() for name in op.outputs}
        carried = self._carried(node, children)
        names = Names(
            self.graph, self.maker, {**arguments, **{name: "x" for name in carried if name in made}}
        )
        always: frozenset[str] = frozenset() if self.is_whole else self.context.block_paths
        recomputed = self.context.block_paths if self.context.recomputing.policies else frozenset()
        loops = LoopFinder(
            self.graph, node, children, self.readers, outputs, always, recomputed, self.holding.paths
        )
        constants = self.holding.reads(node)
        return Body(self.context, node, names, loops, children, arguments, constants, outputs)

    def _carried(self, node: Node, children: Mapping[str, Instance]) -> list[str]:
        """Activations that go into a repeated block: the main line of the model."""
        blocks = (child for path, child in children.items() if path in self.context.block_paths)
        return [name for block in blocks for name in block.inputs if self.graph.tensors[name].requires_grad]

    def _inputs(self, node: Node) -> tuple[str, ...]:
        """What comes from outside: not made here, and held neither here nor by a child. Activations come
        first, and of those of one rank the widest.
        """
        made = {name for op in node.ops() for name in op.outputs}
        read = dict.fromkeys(
            name
            for op in node.ops()
            for name in op.inputs
            if name not in made and not self.holding.path(name, op).startswith(prefix(node.path))
        )
        tensors = self.graph.tensors
        ordered = sorted(read, key=lambda name: not tensors[name].requires_grad)
        if not ordered or not tensors[ordered[0]].requires_grad:
            return tuple(ordered)
        rank = len(tensors[ordered[0]].shape)
        alike = [name for name in ordered if tensors[name].requires_grad and len(tensors[name].shape) == rank]
        widest = max(alike, key=lambda name: tensors[name].shape[-1:])
        return (widest, *(each for each in ordered if each != widest))

    def _outputs(self, node: Node) -> tuple[str, ...]:
        inside = {op.name for op in node.ops()}
        return tuple(
            name
            for op in node.ops()
            for name in op.outputs
            if name in self.stage.sends or any(reader not in inside for reader in self.readers.get(name, ()))
        )

    def _argument_names(self, inputs: Iterable[str]) -> dict[str, str]:
        """Names of the arguments: `x` for the activation, the others after what made them."""
        names: dict[str, str] = {}
        for tensor in inputs:
            activation = (
                self.graph.tensors[tensor].requires_grad and tensor not in self.graph.parameter_tensors
            )
            base = "x" if activation and "x" not in names.values() else self.names.of(tensor)
            names[tensor] = fresh(base, {*names.values(), *RESERVED})
        return names


def _constructor(members: Sequence[str], needs_mesh: bool, has_layers: bool) -> list[str]:
    """The `__init__` with the blank line after it; nothing where it would only call the one of
    `nn.Module`."""
    parameters = (", mesh: DeviceMesh" if needs_mesh else "") + (", layers: range" if has_layers else "")
    if not members and not parameters:
        return []
    head = [f"def __init__(self{parameters}) -> None:", "    super().__init__()"]
    return [*head, *(f"    {line}" for line in members), ""]


def _signature(arguments: Iterable[str], result: str, more: str = "") -> str:
    given = [f"{name}: Tensor" for name in arguments] + ([more] if more else [])
    return f"def forward({', '.join(['self', *given])}) -> {result}:"


def _returns(outputs: Sequence[str]) -> str:
    return "Tensor" if len(outputs) == 1 else f"tuple[{', '.join(['Tensor'] * len(outputs))}]"


def _with_layer_range(members: Sequence[str]) -> tuple[list[str], str]:
    """Members of a stage with its range of layers as a parameter, and that range; "" where it has not just
    one.

    Stages that differ only in which layers they hold are then the same class.
    """
    spans = [span for line in members for span in re.findall(r"for i in (range\([^)]*\))", line)]
    if len(spans) != 1:
        return list(members), ""
    return [line.replace(f"for i in {spans[0]}", "for i in layers") for line in members], spans[0]
