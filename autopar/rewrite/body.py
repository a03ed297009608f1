"""The body of one class's `forward`: a statement for every op and for every call or loop of calls of a
child."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.localize import CAUSAL_ROWS
from autopar.op_kinds import EXCHANGES
from autopar.placements import State
from autopar.rewrite.batch_norm import SPLIT, call_of, keeps_statistics
from autopar.rewrite.context import ProgramContext, access, below
from autopar.rewrite.deferral import NAMESPACE
from autopar.rewrite.draws import axes_apart, drawn, draws_together
from autopar.rewrite.expressions import Expression, Values, literal
from autopar.rewrite.function_forms import attention_options, cross_entropy_options
from autopar.rewrite.loops import Call, LoopFinder
from autopar.rewrite.naming import Names
from autopar.rewrite.op_expressions import expression_of
from autopar.rewrite.scope import Render, Scope, Statement
from autopar.rewrite.tree import CALL, Node
from graphs.ir import Op, Ref

AXIS_ARGUMENTS = ("axis", "vocab_axis", "row_axis", "row_axes", "class_axis")
"""Keyword arguments of the ops of a localized graph that name a mesh axis, or several."""

_EXCHANGED = {
    "exchange_counts": "how many rows each rank sends to each expert",
    "to_experts": "rows to the ranks of their experts",
    "from_experts": "rows back in the order in which they were sent",
}

WEIGHTS = {**dict.fromkeys(("transpose", "unsqueeze", "to", "slice", "neg"), 0), "batch_norm": 3}
"""How much of a reader's attention an op takes, if not 1."""


@dataclass(frozen=True)
class Body:
    """What the body of a `forward` is written from.

    `arguments` are the names of what comes in, `constants` the expressions of parameters and buffers that the
    class holds, `results` the tensors it returns, `calls` the borders of its children by path.
    """

    context: ProgramContext
    node: Node
    names: Names
    loops: LoopFinder
    calls: Mapping[str, Call]
    arguments: Mapping[str, str]
    constants: Mapping[str, str]
    results: tuple[str, ...]

    def lines(self) -> list[str]:
        """Source lines, the `return` included."""
        scope = Scope(self.arguments, self.constants, self.results)
        position = 0
        while position < len(self.node.items):
            item = self.node.items[position]
            if isinstance(item, Op):
                scope.statements.append(self._op(item))
                position += 1
                continue
            run = self.loops.run(position)
            if self.loops.is_loop(run):
                scope.statements.append(self._loop(run))
            else:
                scope.statements.extend(map(self._call, run))
            position += len(run)
        return scope.lines()

    def axes(self) -> tuple[str, ...]:
        """The mesh axes whose groups the body uses, in the order of first use."""
        ops = [item for item in self.node.items if isinstance(item, Op)]
        named = [op.kwargs[key] for op in ops for key in AXIS_ARGUMENTS if _is_ours(op) and key in op.kwargs]
        named += [axes_apart(op, self._states(op)) for op in ops]
        return tuple(dict.fromkeys(axis for axes in named for axis in _each(axes)))

    def looped(self) -> tuple[str, ...]:
        """The containers over which the body loops, as expressions."""
        nodes = [index for index, item in enumerate(self.node.items) if isinstance(item, Node)]
        runs = (self.loops.run(index) for index in nodes)
        return tuple(dict.fromkeys(self._container(run[0]) for run in runs if self.loops.is_loop(run)))

    # --- ops

    def _states(self, op: Op) -> Mapping[str, State]:
        """How the first result of an op lies on each axis."""
        return self.context.states.get(op.outputs[0], {})

    def _op(self, op: Op) -> Statement:
        names = tuple(self.names.of(name) for name in op.outputs)
        reads = tuple(name for name in op.inputs if name not in self.constants)
        states = self._states(op)
        if keeps_statistics(op) or op.target == SPLIT:
            holder = access(below(op.module, self.node.path))
            return Statement(
                op.outputs,
                reads,
                lambda values: call_of(op, values, holder),
                names,
                weight=WEIGHTS["batch_norm"],
                foldable=op.target != SPLIT,
                comment=self._comment(op) if op.target == SPLIT else "",
            )
        if _is_ours(op):
            return Statement(
                op.outputs,
                reads,
                drawn(op, states, lambda values: _runtime_call(op, values, self.context)),
                names,
                weight=2,
                foldable=False,
                comment=self._comment(op),
            )
        if op.target == CALL:
            leaf = access(below(op.module, self.node.path))
            return Statement(
                op.outputs,
                reads,
                lambda values: Expression(f"{leaf}({literal(op.args[0], values)})"),
                names,
            )
        weight = WEIGHTS.get(op.target.split(".")[1], 1)
        return Statement(
            op.outputs,
            reads,
            drawn(op, states, self._plain(op)),
            names,
            weight=weight,
            foldable=len(op.outputs) == 1,
            # What is inside of a draw would be drawn by it.
            absorbs=not (draws_together(op, states) or axes_apart(op, states)),
        )

    def _plain(self, op: Op) -> Render:
        if op.target.startswith(NAMESPACE):
            return lambda values: _deferred(op, values)
        holders = (*self.arguments.values(), *self.constants.values())
        device = next((f"{name}.device" for name in holders), None)
        tensors = self.context.graph.tensors
        return lambda values: expression_of(op, values, tensors, self.context.sizes, device)

    def _comment(self, op: Op) -> str:
        """What a collective, or an op that is split, does to the state of a tensor."""
        name = op.target.partition(".")[2]
        if name == "batch_norm":
            return f"{op.kwargs['row_axis']}: rows are split, statistics are those of all"
        if name == "embedding":
            return f"{op.kwargs['vocab_axis']}: the rows of the table are split -> P/R"
        if name == "cross_entropy":
            split = {"row_axes": "rows are split -> P/R", "class_axis": "classes are split -> R/R"}
            given = {key: ", ".join(_each(op.kwargs[key])) for key in split if key in op.kwargs}
            return "; ".join(f"{axes}: {split[key]}" for key, axes in given.items())
        if op.target == CAUSAL_ROWS:
            axis = op.kwargs["row_axis"]
            return f"{axis}: rows of the queries are split -> {self.context.states[op.output][axis]}"
        if op.target in EXCHANGES:
            return f"{op.kwargs['axis']}: {_EXCHANGED[name]}"
        source, axis = op.args[0], op.kwargs["axis"]
        assert isinstance(source, Ref)
        before, after = (self.context.states[tensor].get(axis) for tensor in (source.name, op.output))
        return f"{axis}: {before} -> {after}"

    # --- calls of children

    def _call(self, item: Node) -> Statement:
        call = self.calls[item.path]
        return Statement(
            call.outputs,
            self._reads(call),
            self._calling(access(below(item.path, self.node.path)), item),
            self._bases(item, call),
            weight=2,
            foldable=len(call.outputs) == 1,
        )

    def _loop(self, run: Sequence[Node]) -> Statement:
        return Statement(
            targets=self.calls[run[-1].path].outputs,
            reads=self._reads(self.calls[run[0].path]),
            render=self._calling("layer", run[0], container=run[0].container),
            base=("x",),
            foldable=False,
            absorbs=False,
            loop=self._loop_head(run),
            carried=self.loops.carried(run),
        )

    def _loop_head(self, run: Sequence[Node]) -> str:
        container = self._container(run[0])
        if self._is_looked_up(run[0]):
            return f"for number, layer in {container}.items():"
        return f"for layer in {container}.values():"

    def _is_looked_up(self, item: Node) -> bool:
        """Whether a block in a loop has its own way to keep."""
        return self.context.recomputing.is_mixed and item.path in self.context.block_paths

    def _reads(self, call: Call) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name in call.inputs if name not in self.constants))

    def _container(self, item: Node) -> str:
        return access(below(item.container, self.node.path))

    def _bases(self, item: Node, call: Call) -> tuple[str, ...]:
        tensors = self.context.graph.tensors
        if len(call.outputs) == 1 and tensors[call.outputs[0]].requires_grad:
            given = self.names.given.get(call.outputs[0])
            return (given or ("x" if item.attribute.isdigit() else item.attribute),)
        return tuple(self.names.of(name) for name in call.outputs)

    def _calling(self, module: str, item: Node, container: str | None = None) -> Render:
        """The call of a child, told what to keep where it is a block that computes something again; in a loop
        over a `container` of blocks that differ, as the table says."""
        call = self.calls[item.path]

        def render(values: Values) -> Expression:
            arguments = ", ".join(values[name].text for name in call.inputs)
            if container is not None and self._is_looked_up(item):
                return Expression(f'{module}({arguments}, keep=KEPT.get(f"{container}.{{number}}"))')
            return Expression(f"{module}({arguments}{self.context.recomputing.kept(item.path)})")

        return render


def _is_ours(op: Op) -> bool:
    return op.target.startswith("autopar.")


def _each(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes


def _deferred(op: Op, values: Values) -> Expression:
    """The call of a product or a convolution that leaves its weight's gradient."""
    is_grouped = op.target == f"{NAMESPACE}grouped_mm"
    names = ("transposed",) if is_grouped else ("stride", "padding", "dilation", "groups")
    options = zip(names, op.args[3:], strict=False)
    texts = [literal(arg, values) for arg in op.args[:3] if arg is not None]
    texts += [f"{name}={literal(value, values)}" for name, value in options]
    return Expression(f"{op.target.replace('.', '_')}({', '.join(texts)})")


def _runtime_call(op: Op, values: Values, context: ProgramContext) -> Expression:
    """The call of the runtime function that an op of a localized graph stands for."""
    name = op.target.partition(".")[2]
    first, *rest = (literal(arg, values) for arg in op.args)
    match name:
        case "embedding":
            padding = op.args[2] if len(op.args) > 2 else -1
            texts = [rest[0], first, f"self.{op.kwargs['vocab_axis']}"]
            texts += [f"padding_idx={padding}"] if padding >= 0 else []
        case "cross_entropy":
            texts = [first, rest[0]]
            if "class_axis" in op.kwargs:
                name = "sharded_cross_entropy"
                texts.append(f"self.{op.kwargs['class_axis']}")
            if rows := [f"self.{axis}" for axis in op.kwargs.get("row_axes", ())]:
                texts.append(f"rows=[{', '.join(rows)}]")
            texts += cross_entropy_options(op)
        case "scaled_dot_product_attention":
            name = "causal_attention"
            texts = [first, *rest[:2], f"self.{op.kwargs['row_axis']}"]
            texts += ["zigzag=True"] if "zigzag" in op.kwargs else []
            options = attention_options(op, context.graph.tensors).items()
            texts += [f"{key}={literal(value, values)}" for key, value in options if key != "is_causal"]
        case "to_experts":
            texts = [first, rest[0], f"self.{op.kwargs['axis']}"]
        case "from_experts":
            num_rows, *_ = context.sizes(op.output)
            texts = [first, rest[0], num_rows, f"self.{op.kwargs['axis']}"]
        case _:
            texts = [first, f"self.{op.kwargs['axis']}", *rest]
            texts += [f"zigzag={op.kwargs['zigzag']}"] if "zigzag" in op.kwargs else []
    return Expression(f"{name}({', '.join(texts)})")
