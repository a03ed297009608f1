"""What candidates have in common is worked out once: it must not show in any price."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest

from autopar.plan import Parallelism
from autopar.search.describe import training_policy
from autopar.search.evaluate import Evaluated, Evaluator
from autopar.search.given import GivenPrograms, evaluate_given, even_cuts
from autopar.search.pieces import Pieces
from autopar.search.shallow import shallow
from autopar.search.space import Pins, candidates
from autopar.search.units import Chain
from costmodel import Software, software
from tests.autopar.small_models import cluster, tower

MACHINE = cluster(32, per_node=8)
ERAS = ("torch-eager", "te-2024")
DEPTH = 14


@cache
def programs() -> GivenPrograms:
    return GivenPrograms(shallow(tower(depth=DEPTH)))


@cache
def evaluator(era: str) -> Evaluator:
    return Evaluator(MACHINE, training_policy(tower(depth=DEPTH).graph), software(era))


def parallelisms(num: int, seed: int) -> list[Parallelism]:
    found = [*candidates(MACHINE, 64, (1, 2, 4), DEPTH, Pins())]
    return [
        p.model_copy(update={"sequence_parallel": split})
        for split in (None, False)
        for p in random.Random(f"{seed}{split}").sample(found, num // 2)
    ]


def unlike(chain: Chain) -> Chain:
    """The chain with kernels of its own for every unit, so that no two stages are alike."""
    return replace(chain, units=tuple(replace(unit, kernels=(*unit.kernels,)) for unit in chain.units))


def alone(p: Parallelism, era: Software) -> Evaluated:
    """The price when nothing is shared: not with other candidates, nor among stages."""
    fresh = Evaluator(MACHINE, training_policy(tower(depth=DEPTH).graph), era)
    chain = unlike(programs().chain(p, era)).priced(fresh.placed(p))
    return fresh.evaluate(chain, p, even_cuts(chain, p.pp * p.num_virtual_stages))


@pytest.mark.parametrize("era", ERAS)
def test_a_sweep_prices_every_candidate_as_if_it_were_the_only_one(era: str) -> None:
    for p in parallelisms(60, seed=0):
        swept, single = evaluate_given(programs(), evaluator(era), p), alone(p, software(era))
        assert swept.step_s == pytest.approx(single.step_s, rel=1e-12), str(p)
        assert swept.step.terms == pytest.approx(single.step.terms, rel=1e-9, abs=1e-12 * single.step_s)
        for one, other in zip(swept.ledgers, single.ledgers, strict=True):
            assert one.entries == pytest.approx(other.entries, rel=1e-12)


def test_terms_add_up_to_the_total_that_was_worked_out_without_them() -> None:
    for p in parallelisms(40, seed=1):
        step = evaluate_given(programs(), evaluator("te-2024"), p).step
        assert sum(step.terms.values()) == pytest.approx(step.total_s, rel=1e-12)


def test_stages_of_equal_blocks_are_one_piece() -> None:
    chain = programs().chain(Parallelism(), software("te-2024"))
    cuts = even_cuts(chain, 7)
    pieces = Pieces(chain).cut(cuts)
    assert len(pieces) == 7
    assert len(set(pieces[1:-1])) == 1
    assert len(set(pieces)) == 3


def test_a_piece_is_the_same_however_the_rest_is_cut() -> None:
    pieces = Pieces(programs().chain(Parallelism(), software("te-2024")))
    assert pieces.cut((0, 3, 5))[1] is pieces.cut((0, 5, 7))[1]


def test_what_the_stages_of_a_rank_share_counts_once() -> None:
    """Both ends of a model, as on the first rank of a V."""
    pieces = Pieces(programs().chain(Parallelism(), software("te-2024")))
    cuts = even_cuts(pieces.chain, 7)
    ends = pieces.cut(cuts)[0], pieces.cut(cuts)[-1]
    apart = sum(sum(piece.elements.values()) for piece in ends)
    assert sum(pieces.parameters(cuts, (0, 6)).elements.values()) == apart  # nothing is tied here
    assert sum(pieces.parameters(cuts, (0, 0)).elements.values()) == sum(ends[0].elements.values())
