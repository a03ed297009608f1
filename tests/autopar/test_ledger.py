"""Memory of whole training steps against published measurements, and the ledger against its own formula."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphs
from autopar.plan import Parallelism
from autopar.search.given import GivenPrograms, even_cuts
from autopar.search.ledger import rank_ledgers
from autopar.search.pieces import Pieces
from autopar.search.shallow import Shallow
from autopar.search.units import Chain
from costmodel import Ledger, software
from costmodel.memory import usual_policy
from hardware_db import accelerator

MIB = 2**20
SEQUENCE = 4096


@cache
def programs(num_layers: int) -> GivenPrograms:
    """Layers as wide as those of Llama 70B, three of which are captured."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=3,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=SEQUENCE, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    capture = graphs.capture(
        model.train(),
        lambda batch: {
            name: torch.zeros(batch, SEQUENCE, dtype=torch.long) for name in ("input_ids", "labels")
        },
    )
    return GivenPrograms(Shallow(capture, {"model.layers.1": num_layers - 2}))


def ledgers(p: Parallelism, era: str = "te-2024", *, fsdp: bool = False) -> tuple[Ledger, ...]:
    chain = programs(12).chain(p, software(era))
    policy = usual_policy(era, "bf16", p.zero_stage, fsdp=fsdp)
    return rank_ledgers(Pieces(chain), even_cuts(chain, p.pp), p, policy, accelerator("b200-sxm"))


@pytest.mark.parametrize(
    ("dp", "tp", "pp", "measured_mib"),
    [
        # Megatron-LM 0.14 on eight B200, published with SimuMax: max_memory_allocated of the first and the
        # last pipeline rank; 12 layers, microbatches of one sample, distributed optimizer, no recomputation.
        (4, 1, 2, (68149.2, 64478.5)),
        (4, 2, 1, (62136.3,)),
        (2, 4, 1, (40009.8,)),
        (1, 8, 1, (28965.4,)),
    ],
)
def test_allocated_memory_of_published_runs(
    dp: int, tp: int, pp: int, measured_mib: tuple[float, ...]
) -> None:
    p = Parallelism(dp_shard=dp, tp=tp, pp=pp, zero_stage=1, num_microbatches=4)
    found = [ledger.allocated_bytes / MIB for ledger in ledgers(p)]
    assert found == pytest.approx(measured_mib, rel=0.01)


def test_the_last_rank_is_fullest_at_its_loss_and_the_first_in_its_backward() -> None:
    first, last = ledgers(Parallelism(pp=2, num_microbatches=4))
    assert first.moment.startswith("backward of model.layers")
    assert first.logits_bytes == 0
    assert last.logits_bytes > 0
    assert first.activations_bytes > last.activations_bytes  # two microbatches in flight, not one


def test_unsharded_parameters_are_those_of_two_blocks_and_the_root() -> None:
    p = Parallelism(dp_shard=8, zero_stage=3)
    (ledger,) = ledgers(p, "flash-2023", fsdp=True)
    block = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    root = 2 * 128256 * 8192 + 8192
    assert ledger.gathered_bytes == 2 * (2 * block + root) + (2 + 4) * block


def test_recomputation_moves_memory_from_kept_to_working() -> None:
    none, full = (
        ledgers(Parallelism(pp=2, num_microbatches=4, recompute=mode))[0] for mode in ("none", "full")
    )
    assert full.activations_bytes < none.activations_bytes / 10
    assert full.buffers_bytes > none.buffers_bytes


def test_a_stage_is_at_its_peak_where_brute_force_finds_it() -> None:
    """One rank, one microbatch: the most that any unit holds on top of what those before it keep."""
    p = Parallelism()
    chain: Chain = programs(12).chain(p, software("te-2024"))
    (ledger,) = ledgers(p)
    most = max(
        sum(unit.saved["none"].num_bytes for unit in chain.units[:index]) + unit.saved["none"].peak_bytes
        for index, unit in enumerate(chain.units)
    )
    block = max(
        sum(chain.parameters[name].num_bytes for name in unit.parameters)
        for unit in chain.units
        if unit.is_block
    )
    shared = 2 * 2 * SEQUENCE * 128  # cosines and sines, which every block keeps and the rank has once
    held = ledger.activations_bytes + ledger.logits_bytes + ledger.buffers_bytes - block
    assert held == pytest.approx(most - 11 * shared, rel=1e-6)
