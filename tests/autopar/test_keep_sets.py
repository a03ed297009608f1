"""What a block may keep where the rest is computed again, against brute force over all sets of results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import combinations, compress, pairwise

import pytest

from autopar.plan import Parallelism
from autopar.pricing import OpCost, Pricer
from autopar.search.data_axes import mesh_groups
from autopar.search.given import GivenPrograms
from autopar.search.keep_sets import MAX_CHOICES, Choice, frontier
from autopar.search.shallow import shallow
from autopar.search.units import Chain, Unit
from costmodel import Software, software
from hardware_db import cluster
from tests.autopar.test_saved import llama

DEGREES = {
    "whole": Parallelism(microbatch_size=4),
    "tp2 sp": Parallelism(tp=2, microbatch_size=4),
    "tp2 no-sp": Parallelism(tp=2, microbatch_size=4, sequence_parallel=False),
}
EAGER = software("torch-eager")
ERAS = {
    "eager": EAGER,
    "whole blocks": software("te-2024"),
    "slow host": replace(EAGER, host_s_per_launch=1.0, host_s_per_collective=2.0),
}


@cache
def programs() -> GivenPrograms:
    return GivenPrograms(shallow(llama()))


def priced(p: Parallelism, era: Software) -> tuple[Pricer, Chain]:
    pricer = Pricer(cluster("dgx-a100"), mesh_groups(p), era)
    return pricer, programs().chain(p, era).priced(pricer)


def second_block(chain: Chain) -> Unit:
    return [unit for unit in chain.units if unit.is_block][1]


def every_choice(unit: Unit, pricer: Pricer) -> Iterator[tuple[float, int]]:
    """Seconds and bytes of all modes that are tried, and of all sets of results."""
    for mode in ("none", "selective", "full"):
        yield unit.recompute_s[mode], unit.saved[mode].num_bytes
    costs = [pricer.priced(kernels) for kernels in unit.kernels]
    numbers = range(len(unit.results))
    for kept in (set(each) for size in numbers for each in combinations(numbers, size)):
        entering = unit.saved["full"].storages
        stored = {name: size for number in kept for name, size in unit.results[number].storages.items()}
        internal = sum(unit.results[number].internal_bytes for number in kept)
        spared = {unit.results[number].op for number in kept}
        again = [twice and index not in spared for index, twice in enumerate(unit.again["full"])]
        seconds = pricer.unit(list(compress(costs, again))).forward_total_s
        yield seconds, sum({**entering, **stored}.values()) + internal


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("era", ERAS)
def test_the_frontier_is_the_lower_hull_of_all_sets(era: str, degrees: str) -> None:
    """At any price of a byte nothing is cheaper than the frontier's cheapest."""
    pricer, chain = priced(DEGREES[degrees], ERAS[era])
    unit = second_block(chain)
    points = [*every_choice(unit, pricer)]
    assert len(points) > 200
    corners = [(unit.recompute_s[name], unit.saved[name].num_bytes) for name in unit.frontier]
    assert set(corners) <= set(points)
    slopes = [(b[0] - a[0]) / (a[1] - b[1]) for a, b in pairwise(corners)]
    assert slopes == sorted(slopes)
    between = [(one + other) / 2 for one, other in pairwise(slopes)]
    for price_s in (0.0, *slopes, *between, 2 * slopes[-1]):
        best, found = (min(s + price_s * size for s, size in known) for known in (points, corners))
        assert found == pytest.approx(best, rel=1e-9)


def test_wide_products_are_left_out_first_and_what_no_backward_reads_at_once() -> None:
    """Keys and values, whose product is long and whose result is small, are kept longest; torch stops before
    the last product of a block."""
    _, chain = priced(DEGREES["whole"], EAGER)
    unit = second_block(chain)
    assert unit.frontier[0] == "none"
    assert unit.frontier[-1] == "full"
    kept = [unit.kept[name] for name in unit.frontier[1:-1]]
    assert all(set(more) > set(fewer) for more, fewer in pairwise(kept))
    _, key, value, *_, down = unit.kept["selective"]
    assert set(kept[-1]) == {key, value}
    assert all(down not in names for names in kept)


def test_what_is_kept_takes_part_in_the_peak() -> None:
    """Before its backward a block has made everything again, and what is kept lies beside that."""
    unit = second_block(priced(DEGREES["tp2 sp"], EAGER)[1])
    for name in unit.frontier:
        none, saved = unit.saved["none"], unit.saved[name]
        beside = sum(size for storage, size in saved.storages.items() if storage not in none.storages)
        assert saved.peak_bytes == none.peak_bytes + beside
        assert saved.num_bytes <= saved.peak_bytes


def test_repeated_blocks_share_their_choices_but_not_their_storages() -> None:
    deep = GivenPrograms(replace(shallow(llama()), repeats={"model.layers.1": 5}))
    p = DEGREES["whole"]
    chain = deep.chain(p, EAGER).priced(Pricer(cluster("dgx-a100"), mesh_groups(p), EAGER))
    one, other, *_ = [unit for unit in chain.units if unit.modules == ("model.layers.1",)]
    assert one.frontier is other.frontier
    assert one.recompute_s is other.recompute_s
    assert one.kept is other.kept
    for name in one.frontier:
        assert one.saved[name].num_bytes == other.saved[name].num_bytes
        shared = one.saved[name].storages.keys() & other.saved[name].storages.keys()
        assert all("layers" not in storage for storage in shared)
        assert len(shared) < len(one.saved[name].storages)


def test_a_unit_that_is_no_block_has_no_choice() -> None:
    _, chain = priced(DEGREES["whole"], EAGER)
    others = [unit for unit in chain.units if not unit.is_block]
    assert others
    assert {unit.frontier for unit in others} == {("none",)}


def test_a_long_frontier_loses_the_corners_that_say_least() -> None:
    """On a parabola all corners say the same, but for one that lies nearly on a line."""
    points = [Choice(f"{x}", (), x, 1000 + 100 * (20 - x) ** 2) for x in range(21)]
    points[7] = points[7]._replace(num_bytes=1000 + 50 * (14**2 + 12**2) - 1)
    found = frontier(points)
    assert len(found) == MAX_CHOICES
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert points[7] not in found
    assert frontier(points, most=99) == points


def test_costs_of_nothing_leave_the_smallest() -> None:
    free = [Choice(name, (), OpCost().total_s, size) for name, size in (("none", 9), ("full", 1))]
    assert [choice.kept for choice in frontier(free)] == ["full"]
