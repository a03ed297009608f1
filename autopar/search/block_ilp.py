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
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, NamedTuple

from autopar.errors import SearchTimeoutError
from autopar.localize import Assignment
from autopar.placements import RP, RR, Partial, Shard, State
from autopar.search.axis_problem import AxisProblem, Reader, TensorClass
from autopar.search.effort import Effort, clocked
from autopar.search.solver import LinearModel, Size, Term, solve
from autopar.strategies import stored_state

MANY_MICROBATCHES = 1 << 30
"""With so many, what is done once a step counts for nothing."""


@dataclass(frozen=True, slots=True)
class MemoryPrice:
    """What a byte costs, in seconds: a saved activation's, and a stored parameter's (with what trains it)."""

    activation_s_per_byte: float = 0.0
    parameter_s_per_byte: float = 0.0


@dataclass(frozen=True)
class AxisSolution:
    """The best assignment found.

    `time_s` is its price for one microbatch, parameter reductions spread over the microbatches included;
    `objective_s` adds what memory was priced at, and nothing can cost less than `bound_s`. `size` is that of
    the program, `cpu_s` the processor time of solving it.
    """

    assignment: Assignment
    time_s: float
    objective_s: float
    bound_s: float
    status: Literal["optimal", "feasible"]
    size: Size
    cpu_s: float = field(compare=False)


class Part(NamedTuple):
    """What a variable stands for: an op, or a change of `tensors` which `op` reads or makes, in
    `num_instances`; `op` is a representative.

    It leaves `result_bytes` a rank; of a change, `states` are those before and after.
    """

    op: int
    num_instances: int
    result_bytes: float
    tensors: TensorClass | None = None
    is_made: bool = False
    states: tuple[State, State] = (RR, RR)


class BlockIlp:
    """The program of one problem, row by row: built once, solved at any price of memory.

    Costs of its variables are time, of which `op_computed_s` is not communicated; `reductions_s` and the
    bytes by variable say what else to add, and `parts` whose time it is. What is solved is noted with the
    `effort`.
    """

    def __init__(self, problem: AxisProblem, effort: Effort | None = None) -> None:
        self.problem = problem
        self.effort = effort or Effort()
        self.model = LinearModel()
        self.reductions_s: dict[int, float] = {}
        self.activation_bytes: dict[int, float] = {}
        self.parameter_bytes: dict[int, float] = {}
        self.parts: dict[int, Part] = {}
        self.op_computed_s: dict[int, float] = {}
        self.x = {index: self._choose(index) for index in problem.instances}
        self.y = {tensors.name: self._store(tensors) for tensors in problem.parameter_classes}
        for tensors in problem.tensor_classes:
            self._carry(tensors)

    def _choose(self, index: int) -> tuple[int, ...]:
        found = []
        problem = self.problem
        costs = zip(
            problem.offered[index], problem.op_times_s[index], problem.op_computed_s[index],
            problem.saved_bytes[index], strict=True,
        )  # fmt: skip
        for strategy, time_s, computed_s, num_bytes in costs:
            variable = self.model.variable(time_s, integer=True)
            self.op_computed_s[variable] = computed_s
            self.activation_bytes[variable] = num_bytes
            self.parts[variable] = Part(
                index, problem.instances[index], problem.result_bytes(index, strategy)
            )
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
            for pair, variable in shared.items():
                self.parts[variable] = self._part(tensors, tensors.readers[0], *pair)
        for reader, ask in zip(tensors.readers, asks, strict=True):
            out: dict[State, list[Term]] = {state: [(x, -1.0) for x in xs] for state, xs in give.items()}
            into: dict[State, list[Term]] = {state: [(x, -1.0) for x in xs] for state, xs in ask.items()}
            for pair in product(give, ask):
                cost = costs[pair]
                if cost is None:
                    continue
                flow = self.model.variable(0.0 if pair in shared else tensors.count * cost)
                if cost and pair not in shared:
                    self.parts[flow] = self._part(tensors, reader, *pair)
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

    def priced(self, num_microbatches: float = 1, price: MemoryPrice = MemoryPrice()) -> LinearModel:
        """The program with a microbatch's share of the reductions and the price of memory in its costs."""
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
        return self.model.priced(costs)

    @clocked("operators")
    def solve(
        self,
        num_microbatches: float = 1,
        price: MemoryPrice = MemoryPrice(),
        time_limit_s: float | None = None,
    ) -> AxisSolution:
        """The cheapest assignment; raises SearchTimeoutError when the limit passes before there is any."""
        solution = solve(self.priced(num_microbatches, price), time_limit_s=time_limit_s)
        self.effort.solved("operators", solution.size)
        if not solution.values:
            raise SearchTimeoutError(
                f"no strategies for axis {self.problem.axis!r} were found within {time_limit_s} s; "
                "allow more time"
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
            solution.size,
            solution.cpu_s,
        )

    def _part(self, tensors: TensorClass, reader: Reader, made: State, state: State) -> Part:
        """Whose a change is: sums belong to what made their terms, all else to what reads it."""
        problem = self.problem
        maker = tensors.producer if isinstance(made.value, Partial) else None
        op = reader.op if maker is None else maker[0]
        num_bytes = problem.graph.tensors[tensors.name].num_bytes / problem.parts(state)
        return Part(op, tensors.count, num_bytes, tensors, maker is not None, (made, state))

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
