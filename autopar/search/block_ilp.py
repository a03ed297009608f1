"""The operator layer: the cheapest strategy of every op on one mesh axis, as a mixed-integer program.

Sets and data. v are ops, k ∈ K(v) their strategies (`autopar.strategies`), t tensors; p, q states of a tensor
on the axis. A strategy fixes the state it asks of every operand and the state of every result. Ops at the
same place of isomorphic blocks share their choice, so v runs over representatives, with n_v instances;
tensors made by the same representative and read by the same representatives are one t, with n_t instances.
Every cost below is a true price of the local graph (`autopar.pricing`), forward and backward, for one
microbatch.

    minimise   Σ (a_vk + λ m_vk) x_vk  +  Σ n_t c_tpq z_tpq  +  Σ n_t (r_tp / M + λ' b_tp) y_tp

    x_vk ∈ {0,1}    op v uses strategy k                                                    `_choose`
    y_tp ∈ {0,1}    parameter t is stored in state p                                         `_store`
    Σ_k x_vk = 1,   Σ_p y_tp = 1,   y as the consumers ask                                   `_store_as_asked`
    give_tp = Σ_{k makes t in p} x_vk, or y_tp;   ask_tuq = Σ_{k of consumer u asks t in q} x_uk
    f_tupq ≥ 0      consumer u gets t in q from p                                            `_carry`
    Σ_q f_tupq = give_tp,   Σ_p f_tupq = ask_tuq      for every consumer u
    z_tpq ≥ f_tupq  for every u: one conversion serves all who need it                       `_carry`
    f_tupq = 0      where no conversion leads from p to q

a is the time of the op and m the bytes that autograd saves for it, in all its instances; c is the time of a
conversion, r that of summing a partial parameter gradient over the axis, once in M microbatches; b are a
parameter's bytes; λ and λ' say what a byte costs. With λ = λ' = 0 the objective is time; raising them walks
the frontier of time and memory. The flow rows are those of a transport problem, so the relaxation is integral
but for tensors with several consumers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal

from autopar.errors import SearchTimeoutError
from autopar.localize import Assignment, Localized, localize
from autopar.placements import PR, RP, RR, Partial, Shard, State
from autopar.pricing import Pricer, Traffic, total
from autopar.search.shallow import local_counts
from autopar.search.solver import LinearModel, Term, solve
from autopar.strategies import Strategy, conversion, natural_sections, stored_state, strategies
from graphs.ir import Op, OpGraph

LOSS_STATES = (RR, PR)
"""What the loss may be: known to all, or a sum of terms. Either way its gradient is one on every rank."""


@dataclass(frozen=True, slots=True)
class MemoryPrice:
    """What a byte costs, in seconds: a saved activation's, and a stored parameter's (with what trains it)."""

    activation_s_per_byte: float = 0.0
    parameter_s_per_byte: float = 0.0


@dataclass(frozen=True, slots=True)
class Reader:
    """A representative op that reads a tensor, and at which operand."""

    op: int
    position: int


@dataclass(frozen=True)
class TensorClass:
    """Tensors that are made and read alike.

    `name` is one of them; `producer` is the representative op and result that make it, None for what the
    graph starts from; `count` is how many they are, at full depth.
    """

    name: str
    producer: tuple[int, int] | None
    readers: tuple[Reader, ...]
    members: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class AxisSolution:
    """The best assignment found.

    `time_s` is its price for one microbatch, parameter reductions spread over the microbatches included;
    `objective_s` adds what memory was priced at, and nothing can cost less than `bound_s`.
    """

    assignment: Assignment
    time_s: float
    objective_s: float
    bound_s: float
    status: Literal["optimal", "feasible"]


class AxisProblem:
    """The choice of strategies on one axis for one graph; strategies and prices are worked out once.

    `graph` is local on all outer axes and knows its blocks; `pricer` knows the axis' group. `counts` says for
    how many ops of a deeper model each op stands.
    """

    def __init__(
        self, graph: OpGraph, axis: str, pricer: Pricer, counts: Sequence[int] | None = None
    ) -> None:
        self.graph = graph
        self.axis = axis
        self.pricer = pricer
        self.size = pricer.groups[axis].size
        self.counts = tuple(counts) if counts is not None else (1,) * len(graph.ops)
        self.instances: dict[int, int] = {}
        for index, count in zip(graph.representative, self.counts, strict=True):
            self.instances[index] = self.instances.get(index, 0) + count
        distinct = replace(graph, ops=tuple(graph.ops[index] for index in self.instances), blocks=())
        sections = natural_sections(distinct, self.size)
        self.offered = {index: self._offered(index, sections) for index in self.instances}
        self._conversion_s: dict[tuple[int, bool, State, State], float | None] = {}

    def _offered(
        self, index: int, sections: Mapping[int, tuple[tuple[int, ...], ...]]
    ) -> tuple[Strategy, ...]:
        op = self.graph.ops[index]
        found = strategies(op, self.graph, self.size, sections)
        if self.graph.loss in op.outputs:
            position = op.outputs.index(self.graph.loss)
            found = tuple(strategy for strategy in found if strategy.results[position] in LOSS_STATES)
        return found

    @cached_property
    def tensor_classes(self) -> tuple[TensorClass, ...]:
        """All tensors that some op reads, in order of first appearance."""
        return _tensor_classes(self.graph, self.counts)

    @cached_property
    def parameter_classes(self) -> tuple[TensorClass, ...]:
        """Those of them that are parameters."""
        return tuple(
            tensors for tensors in self.tensor_classes if tensors.name in self.graph.parameter_tensors
        )

    @cached_property
    def op_times_s(self) -> Mapping[int, tuple[float, ...]]:
        """Per representative op, the time of all its instances together under each of its strategies.

        Instances differ only in which of their operands and results a fused chain keeps out of memory.
        """
        traffic = Traffic.of(self.graph)
        kinds: dict[int, dict[object, tuple[Op, int]]] = {index: {} for index in self.instances}
        for op, index, count in zip(self.graph.ops, self.graph.representative, self.counts, strict=True):
            storages = (self.graph.tensors[name].storage for name in (*op.inputs, *op.outputs))
            kind = tuple((traffic.is_read(storage), traffic.is_written(storage)) for storage in storages)
            one, others = kinds[index].get(kind, (op, 0))
            kinds[index][kind] = one, others + count
        return {
            index: tuple(
                sum(count * self._op_time_s(one, strategy, traffic) for one, count in kinds[index].values())
                for strategy in offered
            )
            for index, offered in self.offered.items()
        }

    def _op_time_s(self, op: Op, strategy: Strategy, traffic: Traffic) -> float:
        local = self._local_op(op, strategy)
        inside = traffic | Traffic.of(local)
        return total(self.pricer.op(part, local.tensors, inside) for part in local.ops).total_s

    def _local_op(self, op: Op, strategy: Strategy) -> OpGraph:
        """The local form of one op alone, its operands already in the states that the strategy asks."""
        names = dict.fromkeys((*op.inputs, *op.outputs))
        alone = OpGraph(
            name=op.name,
            tensors={name: self.graph.tensors[name] for name in names},
            ops=(op,),
            parameters=(),
            buffers=(),
            inputs=tuple(dict.fromkeys(op.inputs)),
            outputs=op.outputs,
            output_names=op.outputs,
            loss=None,
            modules={},
        )
        sources = dict(zip(op.inputs, strategy.operands, strict=True))
        return localize(Localized.of(alone), Assignment(self.axis, self.size, (strategy,), sources)).graph

    @cached_property
    def saved_bytes(self) -> Mapping[int, tuple[float, ...]]:
        """Per representative op, the bytes that all its instances save for backward under each strategy.

        A storage that several ops save is shared among them.
        """
        savers: dict[str, int] = {}
        for op in self.graph.ops:
            for storage in op.saved:
                savers[storage] = savers.get(storage, 0) + 1
        free = {*self.graph.parameter_tensors, *self.graph.inputs, *(b.tensor for b in self.graph.buffers)}

        def saved(op: Op, strategy: Strategy) -> float:
            states = dict(
                zip((*op.inputs, *op.outputs), (*strategy.operands, *strategy.results), strict=True)
            )
            num_bytes = op.saved_internal_bytes / (self.size if strategy.factor else 1)
            for name, state in states.items():
                tensor = self.graph.tensors[name]
                if tensor.storage in op.saved and tensor.storage not in free:
                    num_bytes += tensor.num_bytes / self.parts(state) / savers[tensor.storage]
            return num_bytes

        return {
            index: tuple(
                self.instances[index] * saved(self.graph.ops[index], strategy) for strategy in offered
            )
            for index, offered in self.offered.items()
        }

    def parts(self, state: State) -> int:
        """Into how many parts a tensor in this state is split."""
        return self.size if isinstance(state.value, Shard) else 1

    def conversion_s(self, name: str, source: State, target: State) -> float | None:
        """Time of the conversion of one tensor, None where there is none."""
        if source == target:
            return 0.0
        tensor = self.graph.tensors[name]
        key = (tensor.num_bytes, tensor.requires_grad, source, target)
        if key not in self._conversion_s:
            how = conversion(source, target, tensor.requires_grad)
            self._conversion_s[key] = None
            if how is not None:
                backward = tensor.requires_grad
                cost = self.pricer.conversion(how.name, tensor.num_bytes, self.axis, backward=backward)
                self._conversion_s[key] = cost.total_s
        return self._conversion_s[key]

    def stored_states(self, tensors: TensorClass) -> tuple[State, ...]:
        """In what states a parameter may be stored: whole, or in the shards that some reader asks."""
        asked = (
            strategy.operands[reader.position]
            for reader in tensors.readers
            for strategy in self.offered[reader.op]
        )
        shards = (state for state in asked if isinstance(state.value, Shard))
        whole = (RR, RP) if self.graph.tensors[tensors.name].requires_grad else (RR,)
        return (*whole, *dict.fromkeys(shards))

    def reduction_s(self, name: str, state: State) -> float:
        """Time of summing a partial parameter gradient over the axis, once a step."""
        if state != RP:
            return 0.0
        num_bytes = self.graph.tensors[name].num_bytes
        return self.pricer.bucketed_s("all_reduce", num_bytes, self.pricer.groups[self.axis])

    @cached_property
    def _rows(self) -> _Rows:
        return _Rows(self)

    def solve(
        self,
        num_microbatches: float = 1,
        price: MemoryPrice = MemoryPrice(),
        time_limit_s: float | None = None,
    ) -> AxisSolution:
        """The cheapest assignment. Raises SearchTimeoutError when the limit passes before the solver has any."""
        return self._rows.solve(num_microbatches, price, time_limit_s)

    def time_s(self, assignment: Assignment, num_microbatches: float = 1) -> float:
        """The price of an assignment, found independently of the program: localize the graph and price that."""
        local = localize(Localized.of(self.graph), assignment).graph
        counts = local_counts(
            local.ops, dict(zip((op.name for op in self.graph.ops), self.counts, strict=True))
        )
        costs = zip(self.pricer.graph(local), counts, strict=True)
        sums_s = sum(
            tensors.count * self.reduction_s(tensors.name, assignment.sources[tensors.name])
            for tensors in self.parameter_classes
        )
        return sum(count * cost.total_s for cost, count in costs) + sums_s / num_microbatches


class _Rows:
    """The program row by row. Its costs are time; `reductions_s` and the bytes by variable say what else to
    add."""

    def __init__(self, problem: AxisProblem) -> None:
        self.problem = problem
        self.model = LinearModel()
        self.reductions_s: dict[int, float] = {}
        self.activation_bytes: dict[int, float] = {}
        self.parameter_bytes: dict[int, float] = {}
        self.x = {index: self._choose(index) for index in problem.instances}
        self.y = {tensors.name: self._store(tensors) for tensors in problem.parameter_classes}
        for tensors in problem.tensor_classes:
            self._carry(tensors)

    def _choose(self, index: int) -> tuple[int, ...]:
        found = []
        costs = zip(self.problem.op_times_s[index], self.problem.saved_bytes[index], strict=True)
        for time_s, num_bytes in costs:
            variable = self.model.variable(time_s, integer=True)
            self.activation_bytes[variable] = num_bytes
            found.append(variable)
        self.model.row(1, 1, [(variable, 1.0) for variable in found])
        return tuple(found)

    def _store(self, tensors: TensorClass) -> dict[State, int]:
        problem = self.problem
        num_bytes = problem.graph.tensors[tensors.name].num_bytes
        found = {}
        for state in problem.stored_states(tensors):
            variable = self.model.variable(integer=True)
            self.reductions_s[variable] = tensors.count * problem.reduction_s(tensors.name, state)
            self.parameter_bytes[variable] = tensors.count * num_bytes / problem.parts(state)
            found[state] = variable
        self.model.row(1, 1, [(variable, 1.0) for variable in found.values()])
        self._store_as_asked(tensors, found)
        return found

    def _store_as_asked(self, tensors: TensorClass, stored: Mapping[State, int]) -> None:
        """The rule of `autopar.strategies.stored_state` as rows: a shard if all ask it, and a partial
        gradient if, and only if, some reader gives one."""
        asks = [self._ask(tensors, reader) for reader in tensors.readers]
        for state, variable in stored.items():
            if isinstance(state.value, Shard):
                for ask in asks:
                    self.model.row(0, 1, [*((x, 1.0) for x in ask.get(state, ())), (variable, -1.0)])
        if RP not in stored:
            return
        partial = [
            [x for state, xs in ask.items() if isinstance(state.grad, Partial) for x in xs] for ask in asks
        ]
        self.model.row(0, len(asks), [*((x, 1.0) for xs in partial for x in xs), (stored[RP], -1.0)])
        for xs in partial:
            self.model.row(0, 1, [(stored[RR], 1.0), *((x, 1.0) for x in xs)])

    def _carry(self, tensors: TensorClass) -> None:
        give = self._give(tensors)
        asks = [self._ask(tensors, reader) for reader in tensors.readers]
        wanted = dict.fromkeys(state for ask in asks for state in ask)
        costs = {
            (made, state): self.problem.conversion_s(tensors.name, made, state)
            for made, state in product(give, wanted)
        }
        if not any(cost is None or cost > 0 for cost in costs.values()):
            return  # every state can be had for nothing
        shared: dict[tuple[State, State], int] = {}
        if len(asks) > 1:
            shared = {pair: self.model.variable(tensors.count * cost) for pair, cost in costs.items() if cost}
        for ask in asks:
            out: dict[State, list[Term]] = {state: [(x, -1.0) for x in xs] for state, xs in give.items()}
            into: dict[State, list[Term]] = {state: [(x, -1.0) for x in xs] for state, xs in ask.items()}
            for pair in product(give, ask):
                cost = costs[pair]
                if cost is None:
                    continue
                flow = self.model.variable(0.0 if pair in shared else tensors.count * cost)
                out[pair[0]].append((flow, 1.0))
                into[pair[1]].append((flow, 1.0))
                if pair in shared:
                    self.model.row(0, 1, [(shared[pair], 1.0), (flow, -1.0)])
            for terms in (*out.values(), *into.values()):
                self.model.row(0, 0, terms)

    def _give(self, tensors: TensorClass) -> dict[State, list[int]]:
        if tensors.name in self.y:
            return {state: [variable] for state, variable in self.y[tensors.name].items()}
        if tensors.producer is None:
            return {RR: [self.model.variable(lower=1.0)]}
        index, result = tensors.producer
        return _by_state(
            (strategy.results[result], variable)
            for strategy, variable in zip(self.problem.offered[index], self.x[index], strict=True)
        )

    def _ask(self, tensors: TensorClass, reader: Reader) -> dict[State, list[int]]:
        return _by_state(
            (strategy.operands[reader.position], variable)
            for strategy, variable in zip(self.problem.offered[reader.op], self.x[reader.op], strict=True)
        )

    def solve(self, num_microbatches: float, price: MemoryPrice, time_limit_s: float | None) -> AxisSolution:
        added_s = [
            *((variable, seconds / num_microbatches) for variable, seconds in self.reductions_s.items()),
            *(
                (variable, price.activation_s_per_byte * size)
                for variable, size in self.activation_bytes.items()
            ),
            *(
                (variable, price.parameter_s_per_byte * size)
                for variable, size in self.parameter_bytes.items()
            ),
        ]
        costs = list(self.model.costs)
        for variable, seconds in added_s:
            costs[variable] += seconds
        solution = solve(replace(self.model, costs=costs), time_limit_s=time_limit_s)
        if not solution.values:
            raise SearchTimeoutError(
                f"no strategies for axis {self.problem.axis!r} were found within {time_limit_s} s; allow more time"
            )
        values = solution.values
        sizes = (*self.activation_bytes.items(),), (*self.parameter_bytes.items(),)
        priced = zip((price.activation_s_per_byte, price.parameter_s_per_byte), sizes, strict=True)
        penalty_s = sum(rate * size * values[variable] for rate, part in priced for variable, size in part)
        return AxisSolution(
            self._assignment(values),
            solution.objective - penalty_s,
            solution.objective,
            solution.bound,
            "optimal" if solution.status == "optimal" else "feasible",
        )

    def _assignment(self, values: Sequence[float]) -> Assignment:
        problem = self.problem
        graph = problem.graph
        chosen = {
            index: problem.offered[index][max(range(len(variables)), key=lambda k: values[variables[k]])]
            for index, variables in self.x.items()
        }
        sources = dict.fromkeys(
            (*graph.inputs, *(b.tensor for b in graph.buffers), *graph.parameter_tensors), RR
        )
        for tensors in problem.parameter_classes:
            asked = (chosen[reader.op].operands[reader.position] for reader in tensors.readers)
            sources.update(dict.fromkeys(tensors.members, stored_state(asked)))
        choice = tuple(chosen[index] for index in graph.representative)
        return Assignment(problem.axis, problem.size, choice, sources)


def _by_state(pairs: Iterable[tuple[State, int]]) -> dict[State, list[int]]:
    found: dict[State, list[int]] = {}
    for state, variable in pairs:
        found.setdefault(state, []).append(variable)
    return found


def _tensor_classes(graph: OpGraph, counts: Sequence[int]) -> tuple[TensorClass, ...]:
    representative = graph.representative
    found: dict[object, list[str]] = {}
    parts: dict[object, tuple[tuple[int, int] | None, tuple[Reader, ...]]] = {}
    number: dict[object, int] = {}
    for name, consumers in graph.consumers.items():
        if not consumers:
            continue
        places = {(representative[index], graph.ops[index].inputs.index(name)) for index in consumers}
        readers = tuple(Reader(*place) for place in sorted(places))
        producer = None
        key: object = (name, readers)
        count = counts[consumers[0]]
        if name in graph.producer:
            op = graph.producer[name]
            producer = (representative[op], graph.ops[op].outputs.index(name))
            key = (producer, readers)
            count = counts[op]
        elif name in graph.parameter_tensors:
            tensor = graph.tensors[name]
            key = (tensor.shape, str(tensor.dtype), tensor.requires_grad, readers)
        found.setdefault(key, []).append(name)
        parts[key] = (producer, readers)
        number[key] = number.get(key, 0) + count
    return tuple(
        TensorClass(names[0], *parts[key], tuple(names), number[key]) for key, names in found.items()
    )
