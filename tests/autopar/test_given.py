"""Programs of given parallelisms: made once for a model, the same for every batch size and every cluster."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import graphs
import hardware_db
from autopar.plan import Parallelism
from autopar.pricing import Pricer
from autopar.search.data_axes import mesh_groups
from autopar.search.given import GivenPrograms, even_cuts
from autopar.search.shallow import Shallow, shallow
from autopar.search.units import Chain
from costmodel import software

FLASH, NATIVE = software("flash-2023"), software("te-2024")


@cache
def gpt2() -> Shallow:
    """GPT-2 small, its vocabulary of 50257 padded as Megatron-LM pads it."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50304, use_cache=False)).bfloat16()

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(batch, 1024, dtype=torch.long) for name in ("input_ids", "labels")}

    return shallow(graphs.capture(model.train(), inputs, name="gpt2"))


def given(tp: int, microbatch_size: int, *, sequence_parallel: bool | None = None) -> Parallelism:
    return Parallelism(tp=tp, microbatch_size=microbatch_size, sequence_parallel=sequence_parallel)


def priced(chain: Chain, cluster: str, p: Parallelism) -> Chain:
    return chain.priced(Pricer(hardware_db.cluster(cluster), mesh_groups(p), chain.era))


# --- strategies do not depend on sizes ----------------------------------------------------------------------


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_strategies_found_for_one_microbatch_size_are_those_of_another(sequence_parallel: bool) -> None:
    carried = GivenPrograms(gpt2())
    carried.chain(given(2, 1, sequence_parallel=sequence_parallel), FLASH)
    p = given(2, 3, sequence_parallel=sequence_parallel)
    assert carried.chain(p, FLASH) == GivenPrograms(gpt2()).chain(p, FLASH)


def test_a_tensor_axis_divides_the_products_and_halves_what_a_rank_holds() -> None:
    programs = GivenPrograms(gpt2())
    whole, half = (programs.chain(given(tp, 2), FLASH) for tp in (1, 2))

    def flops(chain: Chain) -> float:
        return sum(
            work.flops for unit in chain.units for each in unit.kernels for work in each.forward if work.flops
        )

    def parameters(chain: Chain) -> int:
        return sum(shard.num_elements for shard in chain.parameters.values())

    assert flops(half) == pytest.approx(flops(whole) / 2, rel=1e-3)
    assert parameters(half) == pytest.approx(
        parameters(whole) / 2, rel=0.01
    )  # positions and norms stay whole


def test_sequence_parallelism_keeps_less_and_moves_as_much() -> None:
    """arXiv:2205.05198, section 4.2.2: an all_gather and a reduce_scatter for each all_reduce."""
    programs = GivenPrograms(gpt2())
    plain, split = (programs.chain(given(2, 2, sequence_parallel=sp), FLASH) for sp in (False, True))
    blocks = [next(unit for unit in chain.units if unit.is_block) for chain in (plain, split)]

    def sent(unit: int) -> float:
        moves = [m for each in blocks[unit].kernels for m in (*each.forward_moves, *each.backward_moves)]
        return sum((2 if move.kind == "all_reduce" else 1) * move.num_bytes for move in moves)

    assert sent(1) == pytest.approx(sent(0), rel=0.01)
    saved = [sum(unit.saved["none"].storages.values()) for unit in blocks]
    assert saved[1] < saved[0]


# --- chains are shared, prices are not ----------------------------------------------------------------------


def test_a_chain_is_made_once_for_all_that_run_the_same_kernels() -> None:
    programs = GivenPrograms(gpt2())
    p = given(1, 2)
    chain = programs.chain(p, FLASH)
    for other in (
        p.model_copy(update={"pp": 4, "num_microbatches": 8}),
        p.model_copy(update={"zero_stage": 3}),
    ):
        assert programs.chain(other, FLASH) is chain
    assert programs.chain(p, NATIVE) is not chain


def test_prices_do_not_depend_on_which_cluster_came_first() -> None:
    programs, p = GivenPrograms(gpt2()), given(2, 2)
    chain = programs.chain(p, FLASH)
    before = replace(chain)
    slow, fast = (priced(chain, cluster, p) for cluster in ("dgx-a100", "dgx-h100"))
    assert chain == before
    assert all(not unit.recompute_s for unit in chain.units)
    alone = priced(GivenPrograms(gpt2()).chain(p, FLASH), "dgx-h100", p)
    assert fast == alone
    blocks_s = [sum(unit.cost.total_s for unit in one.units if unit.is_block) for one in (fast, slow)]
    assert blocks_s[0] < blocks_s[1]


def test_copies_of_a_block_have_its_price() -> None:
    p = given(1, 2)
    chain = priced(GivenPrograms(gpt2()).chain(p, FLASH), "dgx-h100", p)
    blocks = [unit for unit in chain.units if unit.is_block]
    assert len(blocks) == 12
    assert len({unit.cost for unit in blocks[1:-1]}) == 1
    assert blocks[1].cost.total_s > 0


# --- cuts ---------------------------------------------------------------------------------------------------


def stage_sizes(chain: Chain, num_stages: int) -> list[int]:
    cuts = [*even_cuts(chain, num_stages), len(chain.units)]
    return [sum(unit.is_block for unit in chain.units[a:b]) for a, b in pairwise(cuts)]


def with_blocks(num_blocks: int) -> Chain:
    """The chain of GPT-2 with so many blocks."""
    chain = GivenPrograms(gpt2()).chain(given(1, 1), FLASH)
    first = next(index for index, unit in enumerate(chain.units) if unit.is_block)
    last = max(index for index, unit in enumerate(chain.units) if unit.is_block)
    blocks = (chain.units[first],) * num_blocks
    return replace(chain, units=(*chain.units[:first], *blocks, *chain.units[last + 1 :]))


@pytest.mark.parametrize(
    ("num_blocks", "num_stages", "sizes"),
    [
        (12, 1, [12]),
        (12, 4, [3, 3, 3, 3]),
        (12, 12, [1] * 12),
        (126, 16, [7, *[8] * 14, 7]),  # Llama 3 405B, arXiv:2407.21783, section 3.3.2
        (14, 4, [3, 4, 4, 3]),
    ],
)
def test_blocks_are_dealt_out_evenly_and_the_ends_have_less_where_that_comes_out(
    num_blocks: int, num_stages: int, sizes: list[int]
) -> None:
    assert stage_sizes(with_blocks(num_blocks), num_stages) == sizes


@pytest.mark.parametrize("num_blocks", [5, 12, 13, 31])
def test_every_block_has_a_stage_and_no_two_differ_by_more_than_one(num_blocks: int) -> None:
    chain = with_blocks(num_blocks)
    for num_stages in range(1, num_blocks + 1):
        sizes = stage_sizes(chain, num_stages)
        assert len(sizes) == num_stages
        assert sum(sizes) == num_blocks
        assert max(sizes) - min(sizes) <= 1
