"""Context parallelism on real ranks: the sequence split, and nothing else different."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.autopar.programs_on_ranks import failures, trial

pytestmark = pytest.mark.distributed

TRIALS = {
    2: (
        trial("llama", cp=2, num_microbatches=2),
        trial("gpt2", cp=2, zero_stage=3),
        trial("bert", cp=2, recompute="full"),
        trial("gemma2", cp=2),
        trial("t5", cp=2),
        trial("bloom", cp=2),
        trial("gemma3text", cp=2, num_microbatches=2),
        trial("whisper", cp=2),
        trial("llama", cp=2, heads=True),
        trial("bert", cp=2, heads=True, num_microbatches=2),
        *(trial(model, seed, cp=2) for model in ("gpt2", "llama", "bert") for seed in range(2)),
    ),
    4: (
        trial("llama", cp=4, microbatch_size=1),
        trial("llama", dp_replicate=2, cp=2, num_microbatches=2),
        trial("qwen2", dp_shard=2, cp=2, zero_stage=3, num_microbatches=2),
        trial("gpt2", tp=2, cp=2, recompute="selective"),
        trial("llama", pp=2, cp=2, num_microbatches=2),
        trial("gpt2", dp_replicate=2, cp=2, heads=True),
        trial("llama", 1, cp=2, tp=2),
        trial("llama", searched=True, cp=2, pp=2, num_microbatches=4),
        trial("bert", searched=True, cp=2, dp_replicate=2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", TRIALS)
def test_programs_equal_their_originals(num_ranks: int, tmp_path: Path) -> None:
    assert not failures(TRIALS[num_ranks], num_ranks, tmp_path)
