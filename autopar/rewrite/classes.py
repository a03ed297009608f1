"""Classes of the emitted model: one for each distinct module, however often it is repeated.

Two modules are the same class when their source is the same. A class is printed from its ops with names of its own, so
the layers of a model, which do the same to different tensors, come out letter by letter alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from autopar.placements import Shard, State
from autopar.rewrite.expressions import Expression, cross_entropy_options, expression_of, literal
from autopar.rewrite.scope import Names, Scope, Statement
from autopar.rewrite.stages import Stage
from autopar.rewrite.tree import CALL, Node
from graphs.ir import Buffer, Op, OpGraph, Ref, Tensor

LITERAL_ELEMENTS = 8
"""A buffer of at most this many elements is written into the source; a larger one is saved beside it."""


@dataclass(frozen=True)
class ProgramContext:
    """What every class of one program is printed from.

    `states` are the states of all tensors by mesh axis; `batch_coefficient` says, for a tensor, how many rows each of
    its dimensions has per sample (0 where it does not depend on the batch); `axis_names` gives the mesh axis behind
    the axis names of the local graph, and `axis_sizes` its ranks; `batch` is the samples of one rank in a microbatch.
    """

    graph: OpGraph
    states: Mapping[str, Mapping[str, State]]
    batch_coefficient: Mapping[str, tuple[int, ...]]
    axis_names: Mapping[str, str]
    axis_sizes: Mapping[str, int]
    batch: int
    recompute: str
    block_paths: frozenset[str]


@dataclass(frozen=True)
class ClassCode:
    """A class of the program: its source, and how an instance of it is made and called."""

    name: str
    text: str
    needs_mesh: bool
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: str = ""

    @property
    def constructor(self) -> str:
        """The expression that makes an instance inside another class."""
        return f"{self.name}({'mesh' if self.needs_mesh else ''})"

    @property
    def factory(self) -> str:
        """The function of the mesh that makes a stage: the class, told its range of layers where it wants one."""
        return f"functools.partial({self.name}, layers={self.layers})" if self.layers else self.name


class ClassPrinter:
    """Prints the classes of one stage after another; equal ones are printed once."""

    def __init__(self, context: ProgramContext) -> None:
        self.context = context
        self.graph = context.graph
        self.classes: dict[str, ClassCode] = {}
        self.large_buffers: dict[str, torch.Tensor] = {}
        self.looped: set[str] = set()

    def stage(self, root: Node, stage: Stage, name: str) -> ClassCode:
        """The root class of a stage, and with it every class it needs."""
        self.stage_ops = tuple(root.ops())
        self.readers: dict[str, list[str]] = {}
        for op in self.stage_ops:
            for read in op.inputs:
                self.readers.setdefault(read, []).append(op.name)
        self.stage_results = stage.sends
        self.is_whole = stage.num_stages == 1
        self.names = Names(self.graph, (*self.graph.ops, *self.stage_ops), {name: name for name in self.graph.inputs})
        self.holders = _holders(self.graph, self.stage_ops)
        self.held = self._held()
        return self._class(root, name, stage)

    def _held(self) -> dict[str, str]:
        """Paths of all parameters and buffers that the stage holds, with their tensors.

        Of a tied parameter a pipeline stage holds the paths that it uses, a whole model all.
        """
        held: dict[str, str] = {}
        read = {name for op in self.stage_ops for name in op.inputs}
        for op in self.stage_ops:
            for tensor in op.inputs:
                for path in (self.holders.get((tensor, None), ""), self._path(tensor, op)):
                    if path:
                        held.setdefault(path, tensor)
        if self.is_whole:
            for parameter in self.graph.parameters:
                if parameter.tensor in read:
                    held.update({path: parameter.tensor for path in (parameter.name, *parameter.aliases)})
        return held

    # --- one class -------------------------------------------------------------------------------------------------

    def _class(self, node: Node, name: str, stage: Stage | None = None) -> ClassCode:
        children = {id(item): self._class(item, self._class_name(item)) for item in node.items if isinstance(item, Node)}
        ops = tuple(node.ops())
        made = {output for op in ops for output in op.outputs}
        own = self._owned(node)
        inputs = stage.receives + stage.batch if stage else self._inputs(node, ops, made)
        outputs = stage.sends if stage else self._outputs(ops, made)
        arguments = self._argument_names(inputs)
        printer = _Body(self, node, children, arguments, own, outputs)
        body = printer.lines()
        needs_mesh = stage is not None or bool(printer.axes) or any(child.needs_mesh for child in children.values())
        self.looped = printer.looped
        members = self._members(node, children, own, ops)
        signature = self._signature(stage, inputs, arguments, outputs)
        members, layers = _with_layer_range(members) if stage and stage.num_stages > 1 else (members, "")
        parameters = (", mesh: DeviceMesh" if needs_mesh else "") + (", layers: range" if layers else "")
        head = [f"    def __init__(self{parameters}) -> None:"]
        head += ["        super().__init__()"]
        head += [f'        self.{axis} = mesh.get_group("{self.context.axis_names[axis]}")' for axis in printer.axes]
        head += [f"        {line}" for line in members]
        text = "\n".join([*head, "", *signature, *(f"        {line}" for line in body)])
        return replace(self._named(name, text, needs_mesh, node), inputs=inputs, outputs=outputs, layers=layers)

    def _named(self, name: str, text: str, needs_mesh: bool, node: Node) -> ClassCode:
        """The class with this source: an earlier one if there is one, else a new one under a free name."""
        existing = self.classes.get(text)
        if existing is None:
            taken = {code.name for code in self.classes.values()}
            if name in taken:
                name += "".join(part.capitalize() for part in node.attribute.split("_") if not part.isdigit())
            base, number = name, 2
            while name in taken:
                name, number = f"{base}{number}", number + 1
            source = f"class {name}(nn.Module):\n{text}\n"
            existing = self.classes[text] = ClassCode(name, source, needs_mesh, (), ())
        return existing

    def _class_name(self, node: Node) -> str:
        return self.graph.modules[node.path].type_name

    def _inputs(self, node: Node, ops: Sequence[Op], made: set[str]) -> tuple[str, ...]:
        """What comes from outside: not made here, and held neither here nor by a child."""
        read = dict.fromkeys(
            name
            for op in ops
            for name in op.inputs
            if name not in made and not self._path(name, op).startswith(f"{node.path}.")
        )
        return tuple(sorted(read, key=lambda name: not self.graph.tensors[name].requires_grad))

    def _outputs(self, ops: Sequence[Op], made: set[str]) -> tuple[str, ...]:
        inside = {op.name for op in ops}
        return tuple(
            name
            for op in ops
            for name in op.outputs
            if name in self.stage_results or any(reader not in inside for reader in self.readers.get(name, ()))
        )

    def _argument_names(self, inputs: Sequence[str]) -> dict[str, str]:
        """Names of the arguments: `x` for the activation, the others after what made them."""
        names: dict[str, str] = {}
        for tensor in inputs:
            activation = self.graph.tensors[tensor].requires_grad and tensor not in self.graph.parameter_tensors
            base = "x" if activation and "x" not in names.values() else self.names.of(tensor)
            name, number = base, 2
            while name in names.values():
                name, number = f"{base}_{number}", number + 1
            names[tensor] = name
        return names

    def _signature(
        self, stage: Stage | None, inputs: Sequence[str], arguments: Mapping[str, str], outputs: Sequence[str]
    ) -> list[str]:
        result = "Tensor" if len(outputs) == 1 else f"tuple[{', '.join(['Tensor'] * len(outputs))}]"
        if stage is None or stage.num_stages == 1:
            names = "".join(f", {arguments[name]}: Tensor" for name in inputs)
            return [f"    def forward(self{names}) -> {result}:"]
        names = "".join(f", {arguments[name]}: Tensor" for name in stage.receives)
        lines = [f"    def forward(self{names}, **batch: Tensor) -> {result}:"]
        return lines + [f'        {arguments[name]} = batch["{name}"]' for name in stage.batch]

    # --- what the class holds --------------------------------------------------------------------------------------

    def _path(self, tensor: str, op: Op) -> str:
        """The path of a parameter or buffer as `op` reads it, `""` for other tensors."""
        return self.holders.get((tensor, op.module)) or self.holders.get((tensor, None), "")

    def _owned(self, node: Node) -> dict[str, str]:
        """Parameters and buffers held by this class, by tensor: the expression that reads them."""
        child_paths = [item.path for item in node.items if isinstance(item, Node)]
        prefix = f"{node.path}." if node.path else ""
        own: dict[str, str] = {}
        for op in node.ops():
            for tensor in dict.fromkeys(op.inputs):
                path = self._path(tensor, op)
                if not path or not path.startswith(prefix):
                    continue
                if any(path.startswith(f"{child}.") for child in child_paths):
                    continue
                own.setdefault(tensor, f"self.{_access(path.removeprefix(prefix))}")
        return own

    def _members(
        self, node: Node, children: Mapping[int, ClassCode], own: Mapping[str, str], ops: Sequence[Op]
    ) -> list[str]:
        prefix = f"{node.path}." if node.path else ""
        constructors: dict[str, str] = {}
        loose: dict[str, dict[str, str]] = {}
        buffers: list[str] = []
        buffer_tensors = {buffer.tensor for buffer in self.graph.buffers}
        for path, tensor in self._held_paths(node):
            owner, _, attribute = path.removeprefix(prefix).rpartition(".")
            if tensor in buffer_tensors:
                buffers.append(self._buffer(tensor, owner, attribute))
            else:
                loose.setdefault(owner, {})[attribute] = tensor
        for owner, tensors in loose.items():
            if owner:
                constructors[owner] = self._leaf(f"{prefix}{owner}", tensors, ops)
        for item in node.items:
            if isinstance(item, Node):
                constructors[item.path.removeprefix(prefix)] = children[id(item)].constructor
        for line in buffers:
            owner = line.partition("\0")[0]
            if owner:
                constructors.setdefault(owner, "nn.Module()")
        lines = [
            f"self.{attribute} = nn.Parameter(torch.empty({self._shape(tensor)}{self._dtype(tensor)}))"
            for attribute, tensor in loose.get("", {}).items()
        ]
        lines += _assignments(constructors, self.looped)
        lines += [line.partition("\0")[2] for line in buffers]
        return lines + list(self._ties(node, ops))

    def _ties(self, node: Node, ops: Sequence[Op]) -> Iterator[str]:
        """The other paths of tied parameters, where this is the innermost class that has both."""
        prefix = f"{node.path}." if node.path else ""
        child_paths = [f"{item.path}." for item in node.items if isinstance(item, Node)]
        read = {name for op in ops for name in op.inputs}
        for parameter in self.graph.parameters:
            if parameter.tensor not in read:
                continue
            first = self.holders[parameter.tensor, None]
            for path in (parameter.name, *parameter.aliases):
                if path not in self.held:
                    continue
                inside = path.startswith(prefix) and first.startswith(prefix)
                deeper = any(path.startswith(child) and first.startswith(child) for child in child_paths)
                if path != first and inside and not deeper:
                    yield f"self.{_access(path.removeprefix(prefix))} = self.{_access(first.removeprefix(prefix))}  # tied"

    def _held_paths(self, node: Node) -> Iterator[tuple[str, str]]:
        """Paths of parameters and buffers under this class and not under a child of it, with their tensors."""
        child_paths = [f"{item.path}." for item in node.items if isinstance(item, Node)]
        prefix = f"{node.path}." if node.path else ""
        for path, tensor in self.held.items():
            if path.startswith(prefix) and not any(path.startswith(child) for child in child_paths):
                yield path, tensor

    def _leaf(self, path: str, tensors: Mapping[str, str], ops: Sequence[Op]) -> str:
        """The constructor of a leaf module: torch's own where its parameters are just those, else a plain holder."""
        info = self.graph.modules.get(path)
        kind = info.type_name if info is not None and info.defined_in.startswith("torch.nn") else ""
        weight = self.graph.tensors.get(tensors.get("weight", ""))
        calls = [op for op in ops if op.module == path and op.target == CALL]
        if kind == "Linear" and weight is not None and set(tensors) <= {"weight", "bias"} and self._fits(weight, tensors):
            rows, columns = self.local_sizes(weight.name)
            bias = "" if "bias" in tensors else ", bias=False"
            return f"nn.Linear({columns}, {rows}{bias}{self._dtype(weight.name)})"
        if kind == "Embedding" and weight is not None:
            rows, columns = self.local_sizes(weight.name)
            padding = calls[0].kwargs["padding_idx"] if calls else -1
            text = f", padding_idx={padding}" if padding >= 0 else ""
            return f"nn.Embedding({rows}, {columns}{text}{self._dtype(weight.name)})"
        if kind == "LayerNorm" and weight is not None and calls:
            eps = calls[0].kwargs["eps"]
            return f"nn.LayerNorm({self._shape(weight.name)}, eps={eps}{self._dtype(weight.name)})"
        shapes = ", ".join(f"{name}={_tuple(self.local_sizes(tensor))}" for name, tensor in tensors.items())
        return f"Parameters({shapes}{self._dtype(next(iter(tensors.values())))})"

    def _fits(self, weight: Tensor, tensors: Mapping[str, str]) -> bool:
        """Whether the bias is split as the rows of the weight are, so that `nn.Linear` has room for both."""
        return "bias" not in tensors or self.graph.tensors[tensors["bias"]].shape == weight.shape[:1]

    def _buffer(self, tensor: str, owner: str, attribute: str) -> str:
        buffer = next(each for each in self.graph.buffers if each.tensor == tensor)
        holder = f"self.{_access(owner)}" if owner else "self"
        return f"{owner}\0{holder}.register_buffer(\"{attribute}\", {self._value(buffer)}" + (
            ")" if buffer.persistent else ", persistent=False)"
        )

    def _value(self, buffer: Buffer) -> str:
        meta = self.graph.tensors[buffer.tensor]
        if buffer.persistent or buffer.value is None:
            return f"torch.empty({literal(tuple(meta.shape), {})}, dtype={meta.dtype})"
        if buffer.value.numel() <= LITERAL_ELEMENTS:
            return f"torch.tensor({buffer.value.tolist()!r}, dtype={meta.dtype})"
        self.large_buffers[buffer.name] = buffer.value
        return f'saved_buffer("{buffer.name}")'

    # --- sizes -----------------------------------------------------------------------------------------------------

    def _dtype(self, tensor: str) -> str:
        dtype = self.graph.tensors[tensor].dtype
        return "" if dtype == torch.float32 else f", dtype={dtype}"

    def _shape(self, tensor: str) -> str:
        return ", ".join(self.local_sizes(tensor))

    def local_sizes(self, tensor: str) -> list[str]:
        """The local shape of a tensor as text, with the batch and the axis sizes by name."""
        context = self.context
        shape = self.graph.tensors[tensor].shape
        rows = context.batch_coefficient.get(tensor, (0,) * len(shape))
        sizes = []
        for dim, size in enumerate(shape):
            if rows[dim]:
                sizes.append("BATCH" if rows[dim] == 1 else f"BATCH * {rows[dim]}")
                continue
            text, whole = "", size
            for axis, state in context.states.get(tensor, {}).items():
                if isinstance(state.value, Shard) and state.value.dim == dim and axis != "dp":
                    text += f" // {axis.upper()}"
                    whole *= context.axis_sizes[axis]
            sizes.append(f"{whole}{text}")
        return sizes


def _holders(graph: OpGraph, ops: Sequence[Op]) -> dict[tuple[str, str | None], str]:
    """The path of every parameter and buffer, and of a tied one the path that belongs to each module that uses it."""
    holders: dict[tuple[str, str | None], str] = {}
    used: dict[str, list[str]] = {}
    for op in ops:
        for name in op.inputs:
            used.setdefault(name, []).append(op.module)
    for parameter in graph.parameters:
        paths = (parameter.name, *parameter.aliases)
        by_owner = {path.rpartition(".")[0]: path for path in paths}
        users = [module for module in used.get(parameter.tensor, ()) if module in by_owner]
        for module in users:
            holders[parameter.tensor, module] = by_owner[module]
        holders[parameter.tensor, None] = by_owner[users[0]] if users else paths[0]
    for buffer in graph.buffers:
        holders[buffer.tensor, None] = buffer.name
    return holders


def _with_layer_range(members: Sequence[str]) -> tuple[list[str], str]:
    """Members of a stage with its range of layers as a parameter, and that range; "" where it has not just one.

    Stages that differ only in which layers they hold are then the same class.
    """
    spans = [span for line in members for span in re.findall(r"for i in (range\([^)]*\))", line)]
    if len(spans) != 1:
        return list(members), ""
    return [line.replace(f"for i in {spans[0]}", "for i in layers") for line in members], spans[0]


def _tuple(items: Sequence[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def _access(path: str) -> str:
    """Attribute access along a path whose numbers are keys of a `ModuleDict`: `layers["0"].norm`."""
    text = ""
    for name in path.split("."):
        text += f'["{name}"]' if name.isdigit() else f".{name}"
    return text.removeprefix(".")


def _assignments(constructors: Mapping[str, str], ranged: Collection[str]) -> list[str]:
    """Statements that build a tree of members, the containers of the original model as plain modules.

    The containers in `ranged` are built from a range of numbers even if they have one member.
    """
    tree: dict[str, object] = {}
    for path, constructor in constructors.items():
        *containers, attribute = path.split(".")
        branch = tree
        for container in containers:
            inner = branch.setdefault(container, {})
            assert isinstance(inner, dict), f"{path}: {container} is a module of its own"
            branch = inner
        branch[attribute] = constructor
    return list(_build("self", tree, ranged))


def _build(owner: str, tree: Mapping[str, object], ranged: Collection[str]) -> Iterator[str]:
    for name, member in tree.items():
        if isinstance(member, str):
            yield f"{owner}.{name} = {member}"
        elif isinstance(member, dict) and all(key.isdigit() and isinstance(each, str) for key, each in member.items()):
            yield f"{owner}.{name} = {_module_dict(member, f'{owner}.{name}' in ranged)}"
        elif isinstance(member, dict) and all(key.isdigit() for key in member):
            yield f"{owner}.{name} = nn.ModuleDict()"
            for key, each in member.items():
                yield f'{owner}.{name}["{key}"] = nn.Module()' if isinstance(each, dict) else f'{owner}.{name}["{key}"] = {each}'
                if isinstance(each, dict):
                    yield from _build(f'{owner}.{name}["{key}"]', each, ranged)
        elif isinstance(member, dict):
            yield f"{owner}.{name} = nn.Module()"
            yield from _build(f"{owner}.{name}", member, ranged)


def _module_dict(members: Mapping[str, str], always_range: bool) -> str:
    """A `ModuleDict`, runs of the same constructor as a comprehension over their range."""
    runs: list[tuple[int, int, str]] = []
    for key, constructor in members.items():
        number = int(key)
        if runs and runs[-1][1] == number and runs[-1][2] == constructor:
            runs[-1] = (runs[-1][0], number + 1, constructor)
        else:
            runs.append((number, number + 1, constructor))
    if len(runs) == 1 and (runs[0][1] - runs[0][0] > 1 or always_range):
        start, stop, constructor = runs[0]
        span = f"{stop}" if start == 0 else f"{start}, {stop}"
        return f"nn.ModuleDict({{str(i): {constructor} for i in range({span})}})"
    items = []
    for start, stop, constructor in runs:
        if stop - start == 1:
            items.append(f'"{start}": {constructor}')
        else:
            items.append(f"**{{str(i): {constructor} for i in range({start}, {stop})}}")
    return f"nn.ModuleDict({{{', '.join(items)}}})"


class _Body:
    """The statements of one `forward`."""

    def __init__(
        self,
        printer: ClassPrinter,
        node: Node,
        children: Mapping[int, ClassCode],
        arguments: Mapping[str, str],
        own: Mapping[str, str],
        outputs: tuple[str, ...],
    ) -> None:
        self.printer = printer
        self.context = printer.context
        self.graph = printer.graph
        self.node = node
        self.children = children
        self.axes: dict[str, None] = {}
        self.looped: set[str] = set()
        self.arguments = arguments
        self.device = next((f"{name}.device" for name in arguments.values()), None)
        self.outputs = outputs
        self.constants = own
        made = [name for op in node.ops() for name in op.outputs]
        given = {**arguments, **{name: "x" for name in self._carried() if name in made}}
        self.names = Names(self.graph, (*self.graph.ops, *printer.stage_ops), given)

    def _carried(self) -> list[str]:
        """Activations that go into a repeated block: the main line of the model."""
        blocks = (item for item in self.node.items if isinstance(item, Node) and item.path in self.context.block_paths)
        inputs = (name for item in blocks for name in self.children[id(item)].inputs)
        return [name for name in inputs if self.graph.tensors[name].requires_grad]

    def lines(self) -> list[str]:
        scope = Scope(self.arguments, self.constants, self.outputs, reserved=RESERVED)
        items = list(self.node.items)
        position = 0
        while position < len(items):
            item = items[position]
            if isinstance(item, Op):
                scope.statements.append(self._op(item))
                position += 1
                continue
            run = self._run(items, position)
            if self._is_loop(run):
                scope.statements.append(self._loop(run))
            else:
                scope.statements.extend(self._call(call) for call in run)
            position += len(run)
        return scope.lines()

    # --- ops -------------------------------------------------------------------------------------------------------

    def _op(self, op: Op) -> Statement:
        names = tuple(self.names.of(name) for name in op.outputs)
        reads = tuple(name for name in op.inputs if name not in self.constants)
        if op.target.startswith("autopar."):
            axis = str(op.kwargs.get("axis", ""))
            conversion = op.target.partition(".")[2]
            for used in (op.kwargs.get(key) for key in ("axis", "vocab_axis", "row_axis", "class_axis")):
                if used is not None:
                    self.axes[str(used)] = None
            render = self._special(op)
            comment = self._transition(op, axis) if axis else _SPLIT_OPS[conversion]
            return Statement(op.outputs, reads, render, names, weight=2, foldable=False, comment=comment)
        if op.target == CALL:
            relative = op.module.removeprefix(f"{self.node.path}." if self.node.path else "")

            def call(values: Mapping[str, Expression]) -> Expression:
                return Expression(f"self.{_access(relative)}({literal(op.args[0], values)})")

            return Statement(op.outputs, reads, call, names)
        weight = 0 if op.target.split(".")[1] in {"transpose", "unsqueeze", "to", "slice", "neg"} else 1
        single = len(op.outputs) == 1
        return Statement(op.outputs, reads, self._plain(op), names, weight=weight, foldable=single)

    def _plain(self, op: Op) -> Callable[[Mapping[str, Expression]], Expression]:
        def render(values: Mapping[str, Expression]) -> Expression:
            return expression_of(op, values, self.graph.tensors, self._size_arguments, self.device)

        return render

    def _size_arguments(self, op: Op) -> list[str] | None:
        if op.target in {"aten.reshape.default", "aten.expand.default"}:
            return self.printer.local_sizes(op.output)
        return None

    def _special(self, op: Op) -> Callable[[Mapping[str, Expression]], Expression]:
        name = op.target.partition(".")[2]

        def render(values: Mapping[str, Expression]) -> Expression:
            if name == "embedding":
                padding = op.args[2] if len(op.args) > 2 and op.args[2] >= 0 else None
                extra = "" if padding is None else f", padding_idx={padding}"
                ids, weight = literal(op.args[1], values), literal(op.args[0], values)
                return Expression(f"embedding({ids}, {weight}, self.{op.kwargs['vocab_axis']}{extra})")
            if name == "cross_entropy":
                texts = [literal(op.args[0], values), literal(op.args[1], values)]
                if "row_axis" in op.kwargs:
                    texts.append(f"rows=self.{op.kwargs['row_axis']}")
                if "class_axis" in op.kwargs:
                    texts.append(f"classes=self.{op.kwargs['class_axis']}")
                return Expression(f"cross_entropy({', '.join(texts + cross_entropy_options(op))})")
            texts = [literal(op.args[0], values), f"self.{op.kwargs['axis']}"]
            texts += [literal(arg, values) for arg in op.args[1:]]
            return Expression(f"{name}({', '.join(texts)})")

        return render

    def _transition(self, op: Op, axis: str) -> str:
        source = op.args[0]
        assert isinstance(source, Ref)
        before, after = (self.context.states[name].get(axis) for name in (source.name, op.output))
        return f"{axis}: {before} -> {after}"

    # --- calls of children -----------------------------------------------------------------------------------------

    def _call(self, item: Node) -> Statement:
        code = self.children[id(item)]
        relative = _access(item.path.removeprefix(f"{self.node.path}." if self.node.path else ""))
        base = self._bases(item, code)
        render = self._calling(f"self.{relative}", code, item.path in self.context.block_paths)
        reads = tuple(dict.fromkeys(name for name in code.inputs if name not in self.constants))
        return Statement(code.outputs, reads, render, base, weight=2, foldable=len(code.outputs) == 1)

    def _bases(self, item: Node, code: ClassCode) -> tuple[str, ...]:
        if len(code.outputs) == 1 and self.graph.tensors[code.outputs[0]].requires_grad:
            return ("x",) if item.attribute.isdigit() else (item.attribute,)
        return tuple(self.names.of(name) for name in code.outputs)

    def _calling(
        self, module: str, code: ClassCode, is_block: bool
    ) -> Callable[[Mapping[str, Expression]], Expression]:
        def render(values: Mapping[str, Expression]) -> Expression:
            arguments = ", ".join(values[name].text for name in code.inputs)
            match self.context.recompute if is_block else "none":
                case "full":
                    return Expression(f"checkpoint({module}, {arguments}, use_reentrant=False)")
                case "selective":
                    extra = "use_reentrant=False, context_fn=keep_matmuls"
                    return Expression(f"checkpoint({module}, {arguments}, {extra})")
            return Expression(f"{module}({arguments})")

        return render

    def _run(self, items: Sequence[Op | Node], start: int) -> list[Node]:
        """The longest run of sibling calls from `start` that hand one activation from each to the next."""
        first = items[start]
        assert isinstance(first, Node)
        run = [first]
        container = first.path.rpartition(".")[0]
        for item in items[start + 1 :]:
            if not isinstance(item, Node) or item.path.rpartition(".")[0] != container:
                break
            if not self._continues(run[-1], item, run[0]):
                break
            run.append(item)
        return run if first.attribute.isdigit() else [first]

    def _is_loop(self, run: Sequence[Node]) -> bool:
        """Whether a run is a loop over all members of a container.

        Of a pipeline stage even the only layer is, so that stages with more layers are the same class.
        """
        container = run[0].path.rpartition(".")[0]
        calls = (item for item in self.node.items if isinstance(item, Node))
        if not run[0].attribute.isdigit() or sum(item.path.rpartition(".")[0] == container for item in calls) != len(run):
            return False
        if len(run) > 1:
            return True
        code = self.children[id(run[0])]
        is_layer = not self.printer.is_whole and run[0].path in self.context.block_paths
        return is_layer and len(code.outputs) == 1 and len(self._activations(code)) == 1

    def _activations(self, code: ClassCode) -> list[str]:
        return [name for name in code.inputs if self.graph.tensors[name].requires_grad]

    def _continues(self, before: Node, after: Node, first: Node) -> bool:
        previous, code, leader = (self.children[id(node)] for node in (before, after, first))
        if not after.attribute.isdigit() or int(after.attribute) != int(before.attribute) + 1:
            return False
        if len(previous.outputs) != 1 or len(code.outputs) != 1 or len(code.inputs) != len(leader.inputs):
            return False
        made = previous.outputs[0]
        if made in self.outputs or code.inputs.count(made) != 1:
            return False
        inside = {op.name for op in after.ops()}
        if any(reader not in inside for reader in self.printer.readers[made]):
            return False
        place = code.inputs.index(made)
        others = [name for index, name in enumerate(code.inputs) if index != place]
        expected = [name for index, name in enumerate(leader.inputs) if index != place]
        if others != expected:
            return False
        carried_into = self.children[id(first)].inputs[place]
        return carried_into not in others

    def _loop(self, run: Sequence[Node]) -> Statement:
        first, last = self.children[id(run[0])], self.children[id(run[-1])]
        if len(run) > 1:
            carried = first.inputs[self.children[id(run[1])].inputs.index(first.outputs[0])]
        else:
            carried = self._activations(first)[0]
        container = run[0].path.rpartition(".")[0]
        relative = _access(container.removeprefix(f"{self.node.path}." if self.node.path else ""))
        self.looped.add(f"self.{relative}")
        render = self._calling("layer", first, run[0].path in self.context.block_paths)
        return Statement(
            targets=last.outputs,
            reads=tuple(dict.fromkeys(name for name in first.inputs if name not in self.constants)),
            render=render,
            base=("x",),
            foldable=False,
            absorbs=False,
            loop=f"for layer in self.{relative}.values():",
            carried=carried,
        )


_SPLIT_OPS = {
    "embedding": "rows of the table are split: -> P/R",
    "cross_entropy": "split rows give this rank's term, split classes the whole",
}

RESERVED = frozenset(
    {"self", "mesh", "torch", "nn", "F", "layer", "batch", "checkpoint", "embedding", "cross_entropy", "copy", "shard"}
    | {"all_gather", "all_gather_replicated", "shard_partial", "all_reduce", "all_reduce_partial", "reduce_scatter"}
    | {"all_to_all", "first_only", "first_grad", "keep_matmuls", "saved_buffer", "Parameters", "Tensor", "TP", "BATCH"}
)
