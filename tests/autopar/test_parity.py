"""The emitted program does what the original model does: loss, every gradient, parameters after three AdamW
steps.

On 2, 4 and 8 real ranks with gloo, for the strategies on the tensor axis that a person would pin, and for
random ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.autopar.programs_on_ranks import failures, prepare, run, trial

pytestmark = pytest.mark.distributed

TP_OUTERMOST = ("tp", "dp_replicate", "dp_shard", "cp", "pp")
TRIALS = {
    2: (
        trial("mlp", dp_replicate=2, num_microbatches=2),
        trial("mlp", tp=2),
        trial("gpt2", tp=2, num_microbatches=2),
        trial("gpt2", dp_shard=2, zero_stage=1, num_microbatches=2),
        trial("llama", dp_shard=2, zero_stage=2, num_microbatches=2),
        trial("llama", pp=2, num_microbatches=4),
        trial("bert", tp=2, recompute="selective"),
        trial("bert", pp=2, schedule="GPipe", num_microbatches=2),
        trial("llama", tp=2, recompute="mixed", num_microbatches=2),
        trial("bert", 1, tp=2, recompute="mixed", sequence_parallel=False),
        trial("gpt2", 2, pp=2, recompute="mixed", num_microbatches=4),
        trial("t5", tp=2),
        trial("llama", dtype=torch.bfloat16, dp_shard=2, zero_stage=3, num_microbatches=2),
        trial("bert", dtype=torch.bfloat16, tp=2),
        trial("gpt2", dtype=torch.bfloat16, pp=2, num_microbatches=2),
        trial("mixtral", tp=2),
        trial("gpt2", 0, dp_shard=2, zero_stage=2, num_microbatches=2, offload="optimizer"),
        trial("mlp", 2, tp=2, offload="optimizer"),
        *(trial(model, seed, tp=2) for model in ("mlp", "gpt2", "llama", "bert") for seed in range(2)),
    ),
    4: (
        trial("llama", dp_replicate=2, tp=2, recompute="full"),
        trial("llama", dp_shard=2, tp=2, zero_stage=3, num_microbatches=2),
        trial("gpt2", tp=2, pp=2, num_microbatches=2),
        trial("gpt2", dp_replicate=2, dp_shard=2, zero_stage=3),
        trial("bert", dp_shard=2, tp=2, zero_stage=3, recompute="full"),
        trial("llama", 3, dp_shard=2, tp=2, zero_stage=3, recompute="mixed", num_microbatches=2),
        trial("bert", dp_shard=2, pp=2, zero_stage=2, num_microbatches=2),
        trial("mlp", tp=4),
        trial("llama", 5, dp_replicate=2, tp=2),
        trial("gpt2", 3, tp=2, pp=2, num_microbatches=2, axis_order=TP_OUTERMOST),
        trial("gpt2", 2, dp_shard=2, pp=2, zero_stage=1, num_microbatches=2, offload="optimizer"),
    ),
    8: (
        trial("llama", dp_replicate=2, tp=2, pp=2, num_microbatches=2),
        trial("gpt2", dp_shard=2, tp=2, pp=2, zero_stage=3, num_microbatches=2, recompute="full"),
        trial("gpt2", 7, dp_replicate=2, tp=2, pp=2, num_microbatches=2),
        trial("llama", dp_shard=2, cp=2, tp=2, zero_stage=3, recompute="full", num_microbatches=2),
        trial("gpt2", 1, dp_shard=2, cp=2, pp=2, zero_stage=3, num_microbatches=2),
        trial("llama", searched=True, dp_replicate=2, tp=2, pp=2, num_microbatches=2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", TRIALS)
def test_programs_equal_their_originals(num_ranks: int, tmp_path: Path) -> None:
    assert not failures(TRIALS[num_ranks], num_ranks, tmp_path)


def test_parity_notices_a_wrong_program(tmp_path: Path) -> None:
    """A gradient that is not summed over the data axis, as when a rewrite forgets one collective."""
    directory = prepare(trial("mlp", dp_replicate=2), tmp_path / "wrong")
    source = (directory / "train.py").read_text()
    broken = source.replace("rank.gradients.reduce()", "pass")
    assert broken != source
    (directory / "train.py").write_text(broken)
    assert run([directory], 2) == {str(directory): "NOT EQUAL"}
