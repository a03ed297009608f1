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

On the right stands what makes the rows in `autopar.search.block_rows`.

a is the time of the op and m the bytes kept for its backward, in all its instances; c is the time of a
conversion, r that of summing a partial parameter gradient over the axis, once in M microbatches; b are a
parameter's bytes; λ and λ' say what a byte costs. With λ = λ' = 0 the objective is time; raising them walks
the frontier of time and memory. The flow rows are those of a transport problem, so the relaxation is integral
but for tensors with several consumers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, TypeVar

from autopar.errors import SearchTimeoutError
from autopar.localize import Assignment
from autopar.placements import RR, Partial, State
from autopar.pricing import OpCost
from autopar.search.axis_form import FormedProblem
from autopar.search.axis_problem import AxisProblem, Reader, TensorClass
from autopar.search.block_rows import rows_of
from autopar.search.effort import Effort, clocked
from autopar.search.linear_model import LinearModel, Size
from autopar.search.solver import solve
from autopar.strategies import stored_state

_T = TypeVar("_T")

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
    """The program of one problem: built once, solved at any price of memory. Problems of one form share their
    rows.

    Costs of its variables are time; `reductions_s` and the bytes by variable say what else to add, `op_costs`
    what the time of ops is made of, and `parts` whose it is. What is solved is noted with the `effort`.
    """

    def __init__(self, problem: AxisProblem, effort: Effort | None = None) -> None:
        self.problem = problem
        self.effort = effort or Effort()
        self._formed = FormedProblem(problem)
        self.rows = rows_of(self._formed.form)
        self.x = dict(zip(problem.instances, self.rows.x, strict=True))
        self.y = {
            tensors.name: {self._formed.states[number]: variable for number, variable in stored.items()}
            for tensors, stored in zip(problem.parameter_classes, self.rows.y, strict=True)
        }
        self.model = self.rows.model.priced(self._costs())

    def _costs(self) -> list[float]:
        times_s = [seconds for index in self.x for seconds in self.problem.op_times_s[index]]
        costs = times_s + [0.0] * (len(self.rows.model.costs) - len(times_s))
        classes, moves_s = self.problem.tensor_classes, self._formed.moves_s
        for move in self.rows.moves:
            seconds = moves_s[move.tensors][move.number]
            assert seconds is not None, "there is such a move"
            costs[move.variable] = classes[move.tensors].count * seconds
        return costs

    @cached_property
    def op_costs(self) -> Mapping[int, OpCost]:
        """What ops cost under each strategy."""
        return self._by_variable(self.problem.op_costs)

    @cached_property
    def activation_bytes(self) -> Mapping[int, float]:
        """What is saved for backward under each strategy."""
        return self._by_variable(self.problem.saved_bytes)

    def _by_variable(self, values: Mapping[int, Sequence[_T]]) -> dict[int, _T]:
        return {
            variable: value
            for index, variables in self.x.items()
            for variable, value in zip(variables, values[index], strict=True)
        }

    @cached_property
    def reductions_s(self) -> Mapping[int, float]:
        """What each state of a parameter costs once a step."""
        return {
            variable: tensors.count * self.problem.reduction_s(tensors.name, state)
            for tensors in self.problem.parameter_classes
            for state, variable in self.y[tensors.name].items()
        }

    @cached_property
    def parameter_bytes(self) -> Mapping[int, float]:
        """What a parameter takes in each state."""
        tensor_of = self.problem.graph.tensors
        return {
            variable: tensors.count * tensor_of[tensors.name].num_bytes / self.problem.parts(state)
            for tensors in self.problem.parameter_classes
            for state, variable in self.y[tensors.name].items()
        }

    @cached_property
    def parts(self) -> Mapping[int, Part]:
        """What the variables that have a cost stand for."""
        problem, states = self.problem, self._formed.states
        found = {
            variable: Part(index, problem.instances[index], problem.result_bytes(index, strategy))
            for index, variables in self.x.items()
            for variable, strategy in zip(variables, problem.offered[index], strict=True)
        }
        for move in self.rows.moves:
            tensors, carried = problem.tensor_classes[move.tensors], self._formed.form.tensors[move.tensors]
            made, wanted = divmod(move.number, len(carried.wanted))
            pair = states[carried.given[made]], states[carried.wanted[wanted]]
            found[move.variable] = self._part(tensors, tensors.readers[move.reader], *pair)
        return found

    def priced(self, num_microbatches: float = 1, price: MemoryPrice = MemoryPrice()) -> LinearModel:
        """The program with a microbatch's share of the reductions and the price of memory in its costs."""
        reduced_s = (
            (variable, seconds / num_microbatches) for variable, seconds in self.reductions_s.items()
        )
        costs = list(self.model.costs)
        for variable, seconds in (*reduced_s, *self._memory_s(price)):
            costs[variable] += seconds
        return self.model.priced(costs)

    def _memory_s(self, price: MemoryPrice) -> Iterator[tuple[int, float]]:
        """What each variable costs by the memory that it takes."""
        if price.activation_s_per_byte:
            for variable, size in self.activation_bytes.items():
                yield variable, price.activation_s_per_byte * size
        if price.parameter_s_per_byte:
            for variable, size in self.parameter_bytes.items():
                yield variable, price.parameter_s_per_byte * size

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
        penalty_s = sum(seconds * values[variable] for variable, seconds in self._memory_s(price))
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
