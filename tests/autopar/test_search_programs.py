"""What the search makes once and uses again is what it would make anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
from torch import Tensor, nn

import graphs
from autopar import api
from autopar.localize import localize
from autopar.placements import Placement
from autopar.search import evaluate, least_programs, programs, staging
from autopar.search.axis_prices import ClusterPrices
from autopar.search.axis_problem import AxisProblem
from autopar.search.context import ContextProblem
from autopar.search.experts import with_own_experts
from autopar.search.programs import Programs
from autopar.search.replicas import Samples
from autopar.search.shallow import local_counts
from autopar.search.space import parallelism
from autopar.search.units import Chain, build_chain
from costmodel import software
from graphs import Capture
from hardware_db import Cluster, Pools
from hardware_db.pools import join_pools
from tests.autopar.small_models import cluster, tower
from tests.autopar.tiny_models import tiny
from tests.models import case, images


@cache
def captured(name: str) -> Capture:
    if name == "experts":
        return tiny("experts", 64, 7, 64)
    return graphs.capture(case(name).build(), case(name).inputs, name=name)


class Problems:
    """Those of one model for two replicas, each time a new one."""

    def __init__(self, name: str) -> None:
        self.programs = Programs(captured(name), cluster(8))
        self.graph = self.programs.replica(4, 2).local.graph
        self.counts = local_counts(self.graph.ops, self.programs.shallow.counts)

    def tensor(self, size: int) -> AxisProblem:
        prices = ClusterPrices(self.programs.pricer(2, 1, 1, size), "tp")
        return AxisProblem(self.graph, "tp", size, prices, self.counts)

    def context(self, size: int) -> AxisProblem:
        prices, samples = ClusterPrices(self.programs.pricer(2, size, 1, 1), "cp"), Samples.of(self.graph)
        return ContextProblem(self.graph, size, prices, self.counts, whole_heads=False, samples=samples)


@pytest.mark.parametrize(
    ("name", "axis"), [("gpt2", "tensor"), ("resnet", "tensor"), ("mixtral", "tensor"), ("llama", "context")]
)
@pytest.mark.parametrize("size", [2, 4])
def test_a_strategy_costs_what_it_does_when_no_other_is_offered(name: str, axis: str, size: int) -> None:
    problems = Problems(name)
    whole: AxisProblem = getattr(problems, axis)(size)
    most = max(map(len, whole.offered.values()))
    for number in range(most):
        alone: AxisProblem = getattr(problems, axis)(size)
        alone.offered = {index: offered[number : number + 1] for index, offered in whole.offered.items()}
        for index, times_s in alone.op_times_s.items():
            assert times_s == whole.op_times_s[index][number : number + 1], whole.graph.ops[index]
            assert alone.op_costs[index] == whole.op_costs[index][number : number + 1]


def sharers(chain: Chain) -> list[int]:
    """For every unit the first one that has the same kernels."""
    numbers = [id(unit.kernels) for unit in chain.units]
    return [*map(numbers.index, numbers)]


@pytest.mark.parametrize("name", ["mixtral", "experts"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_chain_is_given_its_experts_as_if_made_with_them(name: str, tp: int) -> None:
    programs = Programs(captured(name), cluster(8))
    key = programs.key(parallelism(microbatch_size=2, tp=tp, dp_replicate=2), 0)
    replica, solution = programs.replica_of(key), programs.made(key).solution
    local = replica.local if solution is None else localize(replica.local, solution.assignment)

    def chain(ep: int) -> Chain:
        maker = programs.pricer(key.data_size, 1, ep, tp).kernels
        return build_chain(replica.whole, local, maker, programs.shallow.repeats)

    for ep in (2, 4):
        made, maker = chain(ep), programs.pricer(key.data_size, 1, ep, tp).kernels
        given = with_own_experts(chain(1), local.graph, maker)
        assert given == made != chain(1)
        assert sharers(given) == sharers(made)


@pytest.mark.parametrize("name", ["llama", "mixtral", "clip"])
def test_where_samples_are_is_asked_once_for_all_batch_sizes(name: str) -> None:
    known: dict[int, Mapping[str, Placement]] = {}
    for batch in (2, 3, 4, 6, 9, 1):
        graph = captured(name).at(batch)
        assert Samples.of(graph, known) == Samples.of(graph)
    assert known.keys() == {2, 3}


class Turned(nn.Module):
    """Rows in which positions come before samples, so that these are sections, as long as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.linear(x.transpose(0, 1).flatten(0, 1))
        return rows.square().mean()


def test_samples_that_are_sections_are_asked_for_each_batch_size() -> None:
    turned = graphs.capture(Turned(), lambda batch: {"x": images(batch)[:, 0]})
    known: dict[int, Mapping[str, Placement]] = {}
    two, four = (Samples.of(turned.at(batch), known) for batch in (2, 4))
    assert not known
    assert two.placements != four.placements == Samples.of(turned.at(4)).placements


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_context_axis_is_split_alike_with_samples_of_another_batch_size(name: str) -> None:
    shared = Programs(captured(name), cluster(8))
    for microbatch_size in (1, 2, 4):
        fresh = Programs(captured(name), cluster(8))
        replica, anew = (each.replica(microbatch_size, 2, 2, 1) for each in (shared, fresh))
        assert replica.assignments == anew.assignments


@pytest.mark.parametrize("cp", [1, 2])
def test_software_that_hides_all_is_given_no_more_to_hide(cp: int) -> None:
    """What is hidden costs next to nothing, and still no program communicates for no reason."""
    communicated_s = []
    for overlap in (0.5, 1.0):
        era = replace(software("torch-eager"), tensor_parallel_overlap=overlap)
        programs = Programs(captured("llama"), cluster(8), era)
        chain = programs.program(parallelism(microbatch_size=4, tp=4, cp=cp, dp_replicate=2 // cp)).chain
        costs = [unit.cost for unit in chain.units]
        communicated_s.append(sum(c.forward_communication_s + c.backward_communication_s for c in costs))
    hidden_in_part_s, hidden_s = communicated_s
    assert 0 < hidden_s <= 2 * hidden_in_part_s


@pytest.mark.parametrize("case", ["one cluster", "pools", "experts"])
def test_what_is_forgotten_and_made_again_changes_no_plan(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for how often a layer was asked to solve something."""
    model = captured("mixtral") if case == "experts" else tower(width=1024, depth=6)
    machine: Cluster | Pools = cluster(8, 300e6)
    if case == "pools":
        few = cluster(4, 300e6)
        machine = join_pools([few, few], link_bytes_per_s=5e9, link_latency_s=1e-5)

    def planned() -> dict[str, object]:
        plan = api.plan(model, machine, global_batch=16, space="whole")
        certificate = plan.certificate.model_copy(update={"layers": ()})
        return plan.model_copy(update={"certificate": certificate}).model_dump()

    expected = planned()
    monkeypatch.setattr(staging, "MOST_TABLES", 1)
    monkeypatch.setattr(evaluate, "MOST_CHAINS", 1)
    monkeypatch.setattr(programs, "MOST_PROBLEMS", 1)
    monkeypatch.setattr(least_programs, "MOST_PROBLEMS", 1)
    assert planned() == expected


def test_copies_of_a_unit_whose_experts_are_dealt_out_share_what_runs_again() -> None:
    machine = cluster(8)
    made = Programs(captured("mixtral"), machine).device(2, ep=2).chain
    shared = {id(unit.again) for unit in made.units if unit.is_block}
    assert len(shared) == len({id(unit.kernels) for unit in made.units if unit.is_block})
