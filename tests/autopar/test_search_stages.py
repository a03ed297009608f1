"""Cuts into stages against trying all of them, and the shallow model against the full one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

import graphs
from autopar.plan import Parallelism, ScheduleName
from autopar.pricing import DEFAULT_SOFTWARE, OpCost, Pricer
from autopar.search.bounds import pipeline_floor_s
from autopar.search.data_axes import mesh_groups
from autopar.search.programs import Programs
from autopar.search.saved import Saved
from autopar.search.shallow import shallow
from autopar.search.stage_costs import Machine
from autopar.search.stage_table import StageTable
from autopar.search.stages import best_cut
from autopar.search.units import Chain, ParameterShard, Unit
from costmodel import Overlap, optimizer_policy, peak_in_flight, simulate, software
from graphs import Capture
from tests.autopar.small_models import cluster, tower

POLICY = optimizer_policy("adamw-fp32")
NO_SENDS = [0.0] * 6
ONCE_S = 1e-6
"""More than the optimizer takes for what random units have."""


def random_chain(rng: random.Random, num_units: int) -> Chain:
    units, parameters = [], {}
    for index in range(num_units):
        name = f"weight{index}"
        elements = rng.randint(1, 100)
        parameters[name] = ParameterShard(elements, 4 * elements, False)
        kept = rng.randint(1, 4000)
        saved = Saved({f"x{index}": kept}, peak_bytes=kept + rng.randint(0, 500))
        units.append(
            Unit(
                first_op=f"op{index}",
                modules=(f"layers.{index}",),
                is_block=True,
                cost=OpCost(rng.random(), rng.random(), rng.random() / 4, rng.random() / 4),
                recompute_s={"none": 0.0, "selective": 0.0, "full": 0.0},
                saved={"none": saved, "selective": saved, "full": saved},
                parameters=(name,),
                received_bytes=100,
            )
        )
    return Chain(tuple(units), parameters, software(DEFAULT_SOFTWARE))


def all_cuts(num_units: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    for inner in combinations(range(1, num_units), num_stages - 1):
        yield (0, *inner)


def machine(memory_bytes: float) -> Machine:
    pricer = Pricer(cluster(), mesh_groups(Parallelism()))
    return Machine(pricer, POLICY, Overlap(), memory_bytes)


def exact_s(table: StageTable, p: Parallelism, cuts: tuple[int, ...], sends_s: list[float]) -> float:
    """What the schedule takes with these cuts."""
    stages = list(zip(cuts, [*cuts[1:], table.num_units], strict=True))
    forward_s, backward_s = (
        [float(unit_s[a:b].sum()) for a, b in stages]
        for unit_s in (table.unit_forward_s, table.unit_backward_s)
    )
    own_s = [sends_s[cut] for cut in cuts[1:]]
    return simulate(p.schedule, p.pp, p.num_microbatches, forward_s, backward_s, own_s).step_s


def held_bytes(table: StageTable, p: Parallelism, cuts: tuple[int, ...]) -> float:
    """The most that a stage holds, by its model states and what it keeps in flight."""
    stops = [*cuts[1:], table.num_units]
    flights = peak_in_flight(p.schedule, p.pp, p.num_microbatches)
    wasted = 1 + table.chain.era.fragmentation
    return max(
        16.0 * sum(table.unit_elements[0][a:b])
        + wasted * (flight * sum(table.unit_saved_bytes[a:b]) + table.unit_working_bytes[b - 1])
        for a, b, flight in zip(cuts, stops, flights, strict=True)
    )


@pytest.mark.parametrize("seed", range(40))
def test_no_cuts_that_fit_take_less_than_the_bound_and_the_chosen_little_more(seed: int) -> None:
    rng = random.Random(seed)
    num_stages, num_microbatches = rng.randint(2, 4), rng.choice([1, 2, 4, 8, 24])
    table = StageTable(random_chain(rng, rng.randint(num_stages, 9)))
    schedule: ScheduleName = rng.choice(["1F1B", "GPipe"])
    p = Parallelism(pp=num_stages, num_microbatches=num_microbatches, schedule=schedule)
    sends_s = [rng.choice([0.0, 0.5]) * rng.random() for _ in range(table.num_units)]
    tries = {cuts: held_bytes(table, p, cuts) for cuts in all_cuts(table.num_units, num_stages)}
    budget = rng.uniform(min(tries.values()), max(tries.values()))
    fitting = [cuts for cuts, peak in tries.items() if peak <= budget]
    cut = best_cut(table, p, machine(budget), sends_s)
    assert cut is not None
    assert cut.cuts in fitting
    best_s = min(exact_s(table, p, other, sends_s) for other in fitting)
    assert cut.bound_s <= best_s + ONCE_S
    if schedule == "1F1B" and num_microbatches >= 2 * num_stages:
        assert cut.bound_s >= 0.9 * best_s
        assert exact_s(table, p, cut.cuts, sends_s) <= 1.05 * best_s


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("schedule", ["1F1B", "GPipe"])
def test_no_stages_make_a_pipeline_faster_than_its_floor(schedule: ScheduleName, seed: int) -> None:
    rng = random.Random(seed)
    pp, m = rng.randint(1, 5), rng.randint(1, 12)
    forward_s, backward_s = ([rng.random() ** 2 for _ in range(pp)] for _ in range(2))
    total_s = sum(forward_s) + sum(backward_s)
    floor_s = pipeline_floor_s(Parallelism(pp=pp, num_microbatches=m, schedule=schedule), total_s)
    assert floor_s <= simulate(schedule, pp, m, forward_s, backward_s).step_s * (1 + 1e-9)
    even_s = total_s / 2 / pp
    evenly_s = simulate(schedule, pp, m, [even_s] * pp, [even_s] * pp).step_s
    assert m <= pp or floor_s == pytest.approx(evenly_s)


def test_without_cuts_that_fit_memory_can_be_ignored() -> None:
    table = StageTable(random_chain(random.Random(0), 6))
    p = Parallelism(pp=3, num_microbatches=4)
    assert best_cut(table, p, machine(0.0), NO_SENDS) is None
    cut = best_cut(table, p, machine(0.0), NO_SENDS, fitting=False)
    assert cut is not None
    best_s = min(exact_s(table, p, other, NO_SENDS) for other in all_cuts(6, 3))
    assert 0.8 * best_s <= cut.bound_s <= best_s + ONCE_S


def test_more_stages_than_units_is_no_cut() -> None:
    table = StageTable(random_chain(random.Random(0), 6))
    assert best_cut(table, Parallelism(pp=7, num_microbatches=7), machine(1e9), NO_SENDS) is None


def kept_bytes(chain: Chain) -> dict[str, int]:
    """What all units together keep under each mode, a storage that several do once."""
    found = {}
    for mode in ("none", "selective", "full"):
        kept = [unit.saved[mode] for unit in chain.units]
        storages = {name: size for saved in kept for name, size in saved.storages.items()}
        found[mode] = sum(storages.values()) + sum(saved.internal_bytes for saved in kept)
    return found


@cache
def turns(widths: tuple[int, ...]) -> Capture:
    """Blocks that widen by so many times each."""

    class Block(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 64 * times), nn.Linear(64 * times, 64)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.down(torch.relu(self.up(x))))  # kept here, and by the next

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(64, 64)
            self.layers = nn.ModuleList(map(Block, widths))
            self.head = nn.Linear(64, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x)
            return {"loss": self.head(x).square().mean()}

    return graphs.capture(Model(), lambda batch: {"x": torch.zeros(batch, 64)}, name="turns")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize(
    ("capture", "num_blocks"),
    [
        (tower(depth=9), 3),
        (turns((2, 4) * 7), 6),
        (turns((2, 2, 4) * 6 + (2, 2)), 11),
        (turns((8, *(2, 4) * 5, *(2,) * 6)), 6 + 3),
        (turns((2, 2, 2, 2, 2, 4) * 4 + (2, 2)), 4 * (3 + 1) + 2),
    ],
    ids=["alike", "two take turns", "three with some left", "one after the other", "too few turns"],
)
def test_the_shallow_model_is_as_long_and_as_dear_as_the_full_one(
    capture: Capture, num_blocks: int, tp: int, dp: int
) -> None:
    assert len(shallow(capture).capture.graph.blocks) == num_blocks
    p = Parallelism(dp_replicate=dp, tp=tp, microbatch_size=2, num_microbatches=4)
    programs = Programs(capture, cluster())
    short, full = programs.program(p).chain, programs.depths.finished(programs.program(p)).chain
    whole = Programs(capture, cluster(), shorten=False).program(p).chain
    assert len(short.units) == len(full.units) == len(whole.units)
    for one, other, third in zip(short.units, full.units, whole.units, strict=True):
        assert one.cost == pytest.approx(other.cost, rel=1e-9)
        assert other.cost == pytest.approx(third.cost, rel=1e-9)
        assert one.saved["none"].num_bytes == other.saved["none"].num_bytes
        assert one.received_bytes == other.received_bytes == third.received_bytes
        assert len(one.parameters) == len(third.parameters)
    assert kept_bytes(short) == kept_bytes(full) == kept_bytes(whole)
    assert sum(s.num_elements for s in short.parameters.values()) == sum(
        s.num_elements for s in full.parameters.values()
    )


def test_units_cover_the_model_in_order() -> None:
    capture = tower(depth=6)
    programs = Programs(capture, cluster())
    chain = programs.depths.finished(programs.program(Parallelism())).chain
    blocks = [unit.modules[0] for unit in chain.units if unit.is_block]
    assert blocks == [f"layers.{index}" for index in range(6)]
    assert {name for unit in chain.units for name in unit.parameters} == set(capture.graph.parameter_tensors)
    activation_bytes = 256 * 512 * 4
    assert [unit.received_bytes for unit in chain.units if unit.is_block] == [activation_bytes] * 6


def test_recomputation_keeps_less_and_runs_more() -> None:
    chain = Programs(tower(), cluster()).program(Parallelism()).chain
    pricer = Pricer(cluster(), mesh_groups(Parallelism()))
    for unit in chain.units:
        sizes = [unit.saved[mode].num_bytes for mode in ("none", "selective", "full")]
        again_s = [unit.recompute_s[mode] for mode in ("none", "selective", "full")]
        if unit.is_block:
            assert sizes[2] == 256 * 512 * 4  # the block's input alone
            assert sizes[0] > sizes[2]
            assert 0 < again_s[1] < again_s[2]
            # What the last product makes, the backward of the block does not read.
            last = max(index for index, kernels in enumerate(unit.kernels) if kernels.weight)
            before = pricer.unit([pricer.priced(kernels) for kernels in unit.kernels[:last]])
            assert again_s[2] == pytest.approx(before.forward_total_s)
        else:
            assert again_s == [0, 0, 0]


def test_units_do_not_depend_on_how_the_program_is_split() -> None:
    programs = Programs(tower(), cluster())
    firsts = {
        tuple(
            unit.first_op for unit in programs.program(Parallelism(tp=tp, dp_replicate=dp), level).chain.units
        )
        for tp in (1, 2, 4)
        for dp in (1, 2)
        for level in (0, 2)
    }
    assert len(firsts) == 1
