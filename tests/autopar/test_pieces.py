"""What candidates have in common is worked out once: it must not show in any price."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from autopar.errors import InvalidParallelismError
from autopar.plan import Parallelism, Recompute
from autopar.request import training_policy
from autopar.search.evaluate import Evaluated, Evaluator
from autopar.search.given import GivenPrograms, evaluate_given, even_cuts
from autopar.search.pieces import Pieces
from autopar.search.shallow import shallow
from autopar.search.units import RECOMPUTE_MODES, Chain
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


@cache
def every_parallelism() -> tuple[Parallelism, ...]:
    """Degrees and knobs for 32 devices and a global batch of 64."""
    found = []
    degrees = product((1, 2, 4), (1, 2, 4), (1, 2), (0, 1, 2, 3), (1, 2, 4), RECOMPUTE_MODES, (None, False))
    for tp, pp, virtual, zero_stage, size, recompute, split in degrees:
        dp = MACHINE.num_devices // tp // pp
        count = 64 // dp // size
        if count and (virtual == 1 or (pp > 1 and count % pp == 0)):
            found.append(
                Parallelism.model_validate(
                    {
                        "dp_shard" if zero_stage else "dp_replicate": dp, "tp": tp, "pp": pp,
                        "num_virtual_stages": virtual, "zero_stage": zero_stage, "microbatch_size": size,
                        "num_microbatches": count, "recompute": recompute, "sequence_parallel": split,
                        "schedule": "1F1B" if virtual == 1 else "Interleaved1F1B",
                    }
                )
            )  # fmt: skip
    return tuple(found)


def parallelisms(num: int, seed: int) -> list[Parallelism]:
    return random.Random(seed).sample(every_parallelism(), num)


def unlike(chain: Chain) -> Chain:
    """The chain with kernels of its own for every unit, so that no two stages are alike."""
    return replace(chain, units=tuple(unit._replace(kernels=(*unit.kernels,)) for unit in chain.units))


def alone(p: Parallelism, era: Software, choices: Sequence[str] | None = None) -> Evaluated:
    """The price when nothing is shared: not with other candidates, nor among stages."""
    fresh = Evaluator(MACHINE, training_policy(tower(depth=DEPTH).graph), era)
    chain = unlike(programs().chain(p, era)).priced(fresh.placed(p))
    return fresh.evaluate(chain, p, even_cuts(chain, p.pp * p.num_virtual_stages), choices)


def assert_equal_prices(one: Evaluated, other: Evaluated) -> None:
    """Equal step, terms and ledgers, rounding apart."""
    label = str(one.parallelism)
    assert one.parallelism == other.parallelism
    assert one.step_s == pytest.approx(other.step_s, rel=1e-12), label
    assert one.step.terms == pytest.approx(other.step.terms, rel=1e-9, abs=1e-12 * other.step_s), label
    for ledger, expected in zip(one.ledgers, other.ledgers, strict=True):
        assert ledger.entries == pytest.approx(expected.entries, rel=1e-12), label


@pytest.mark.parametrize("era", ERAS)
def test_a_sweep_prices_every_candidate_as_if_it_were_the_only_one(era: str) -> None:
    for p in parallelisms(60, seed=0):
        assert_equal_prices(evaluate_given(programs(), evaluator(era), p), alone(p, software(era)))


def mixed(p: Parallelism, era: str, choices: Sequence[str] | None) -> Evaluated:
    """The price with a choice for every unit, by an evaluator that knows other candidates."""
    chain = evaluator(era).priced(programs().chain(p, software(era)), p)
    return evaluator(era).evaluate(chain, p, even_cuts(chain, p.pp * p.num_virtual_stages), choices)


@pytest.mark.parametrize("era", ERAS)
def test_every_block_may_choose_for_itself(era: str) -> None:
    rng = random.Random(era)
    for p in parallelisms(30, seed=2):
        units = mixed(p, era, None).chain.units
        choices = [rng.choice(unit.frontier) for unit in units]
        found = mixed(p, era, choices)
        assert_equal_prices(found, alone(p, software(era), choices))
        assert found.choices == tuple(choices)
        assert found.parallelism.recompute == ("mixed" if len({*choices}) > 1 else "none")
        again_s = sum(unit.recompute_s[choice] for unit, choice in zip(units, choices, strict=True))
        assert sum(stage.recompute_s for stage in found.stages) == pytest.approx(again_s)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_one_choice_for_all_blocks_is_the_parallelism_s_mode(mode: Recompute) -> None:
    for p in parallelisms(20, seed=3):
        uniform = p.model_copy(update={"recompute": mode})
        expected = mixed(uniform, "te-2024", None)
        choices = [mode if unit.is_block else "none" for unit in expected.chain.units]
        found = mixed(p, "te-2024", choices)
        assert found == expected
        assert found.choices == tuple(choices)


def test_mixed_without_choices_is_refused() -> None:
    p = Parallelism(dp_replicate=32, recompute="mixed")
    with pytest.raises(InvalidParallelismError, match="give one mode for all blocks: none, attention"):
        mixed(p, "te-2024", None)


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
