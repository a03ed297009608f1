"""What a rank computes again, against trying everything."""

from __future__ import annotations

import random
from itertools import product

import pytest

from autopar.pricing import DEFAULT_SOFTWARE, OpCost
from autopar.search.effort import Effort
from autopar.search.saved import Saved
from autopar.search.stage_table import StageTable
from autopar.search.units import Chain, Unit
from autopar.search.variants import ENOUGH, RankUnits, Variants
from costmodel import software

NAMES = ("none", "selective", "full")
NUM_MOMENTS = 3
KILO = 1024


def random_chain(rng: random.Random, num_units: int) -> Chain:
    units = []
    for index in range(num_units):
        kept = sorted((KILO * rng.randint(1, 4000) for _ in NAMES), reverse=True)
        again_s = sorted(rng.random() for _ in NAMES[1:])
        units.append(
            Unit(
                first_op=f"op{index}",
                modules=(f"layers.{index}",),
                is_block=True,
                cost=OpCost(1.0, 2.0),
                recompute_s=dict(zip(NAMES, (0.0, *again_s), strict=True)),
                saved={
                    name: Saved({f"x{index}": size}, peak_bytes=size)
                    for name, size in zip(NAMES, kept, strict=True)
                },
                parameters=(),
                received_bytes=100,
            )
        )
    return Chain(tuple(units), {}, software(DEFAULT_SOFTWARE))


def random_rank(rng: random.Random, chain: Chain) -> RankUnits:
    """Units that are in flight in other numbers at every moment."""
    flights = {unit: tuple(rng.randint(0, 8) for _ in range(NUM_MOMENTS)) for unit in range(len(chain.units))}
    kept = [
        sum(own[moment] * chain.units[unit].saved["none"].num_bytes for unit, own in flights.items())
        for moment in range(NUM_MOMENTS)
    ]
    return RankUnits(flights, tuple(map(float, kept)))


def kept_bytes(chain: Chain, rank: RankUnits, chosen: tuple[str, ...]) -> float:
    return max(
        sum(
            own[moment] * chain.units[unit].saved[chosen[unit]].num_bytes
            for unit, own in rank.flights.items()
        )
        for moment in range(NUM_MOMENTS)
    )


def again_s(chain: Chain, chosen: tuple[str, ...]) -> float:
    return sum(unit.recompute_s[name] for unit, name in zip(chain.units, chosen, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_what_a_rank_keeps_fits_at_every_moment_in_the_least_time(seed: int) -> None:
    rng = random.Random(seed)
    chain = random_chain(rng, 5)
    rank = random_rank(rng, chain)
    variants = Variants(StageTable(chain, (NAMES,) * 5), Effort())
    allowed = rng.uniform(0.3, 0.9) * max(rank.kept_bytes)
    every = [each for each in product(NAMES, repeat=5) if kept_bytes(chain, rank, each) <= allowed]
    chosen = variants.choose(rank, allowed)
    if not every:
        assert chosen is None
        return
    assert chosen is not None
    found = tuple(chosen[unit] for unit in range(5))
    assert kept_bytes(chain, rank, found) <= allowed + KILO
    best_s = min(again_s(chain, each) for each in every)
    assert again_s(chain, found) <= best_s * (1 + ENOUGH) + 0.002  # later units are counted slower


def test_what_has_no_answer_keeps_the_least_that_it_can() -> None:
    rng = random.Random(0)
    chain = random_chain(rng, 3)
    rank = random_rank(rng, chain)
    variants = Variants(StageTable(chain, (NAMES,) * 3), Effort())
    assert variants.choose(rank, -1.0) is None
    assert variants.relieved(("none",) * 3, [rank], [max(rank.kept_bytes) + 1]) == ("full",) * 3


def test_a_rank_that_fits_is_left_alone() -> None:
    chain = random_chain(random.Random(1), 3)
    ranks = [random_rank(random.Random(seed), chain) for seed in range(2)]
    variants = Variants(StageTable(chain, (NAMES,) * 3), Effort())
    assert variants.relieved(("none", "full", "none"), ranks, [0.0, -1.0]) == ("none", "full", "none")
