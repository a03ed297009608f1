"""Mixtures of experts on real ranks: every rank routes its own rows, to its own experts or to all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.autopar.programs_on_ranks import failures, trial

pytestmark = pytest.mark.distributed

TRIALS = {
    2: (
        trial("mixtral", dp_replicate=2, num_microbatches=2),
        trial("qwen3moe", dp_shard=2, zero_stage=3),
        trial("deepseekv3", cp=2),
        trial("mixtral", 0, tp=2),
        trial("deepseekv3", 1, tp=2),
        trial("mixtral", dp_replicate=2, ep=2, num_microbatches=2),
        trial("deepseekv3", dp_shard=2, ep=2, zero_stage=3, recompute="full"),
        trial("qwen3moe", dp_shard=2, ep=2, zero_stage=1, num_microbatches=2),
    ),
    4: (
        trial("mixtral", dp_replicate=2, tp=2),
        trial("qwen3moe", dp_replicate=2, cp=2),
        trial("mixtral", dp_replicate=4, ep=2),
        trial("deepseekv3", dp_shard=4, ep=4, zero_stage=2),
        trial("qwen3moe", dp_shard=4, ep=2, zero_stage=3, num_microbatches=2, recompute="selective"),
        trial("mixtral", dp_replicate=2, ep=2, tp=2),
        trial("deepseekv3", dp_replicate=2, ep=2, pp=2, num_microbatches=2),
        trial("mixtral", dp_shard=2, dp_replicate=2, ep=2, zero_stage=1),
        trial("qwen3moe", dp_shard=2, ep=2, cp=2, zero_stage=1),
        trial("mixtral", searched=True, dp_replicate=2, ep=2, pp=2, num_microbatches=4),
        trial("mixtral", searched=True, dp_replicate=4, ep=4),
    ),
    8: (
        trial("mixtral", dp_replicate=2, ep=2, tp=2, pp=2, num_microbatches=2),
        trial("deepseekv3", dp_shard=2, ep=2, cp=2, pp=2, zero_stage=3, num_microbatches=2),
        trial("qwen3moe", dp_shard=2, ep=2, cp=2, tp=2, zero_stage=1),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", TRIALS)
def test_programs_equal_their_originals(num_ranks: int, tmp_path: Path) -> None:
    assert not failures(TRIALS[num_ranks], num_ranks, tmp_path)
