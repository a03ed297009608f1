"""Every form of program goes through `torch.compile`, and does the same as without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.autopar.programs_on_ranks import Trial, prepare, trial
from tests.autopar.rank_pool import shared_pool

DRIVER = Path(__file__).with_name("compiled_on_ranks.py")
FP32, BF16 = torch.float32, torch.bfloat16
FORMS = [
    trial("gpt2", dtype=FP32, dp_replicate=2, num_microbatches=2),
    trial("llama", dtype=FP32, dp_shard=2, zero_stage=1, num_microbatches=2),
    trial("llama", dtype=FP32, dp_shard=2, zero_stage=2, recompute="mixed"),
    trial("llama", dtype=FP32, dp_shard=2, zero_stage=3, recompute="selective"),
    trial("llama", dtype=BF16, dp_shard=2, zero_stage=3, recompute="full"),
    trial("llama", dtype=BF16, dp_replicate=2),
    trial("bert", dtype=FP32, dp_replicate=2, recompute="selective"),
    trial("gpt2", dtype=FP32, tp=2, sequence_parallel=False),
    trial("llama", dtype=FP32, tp=2, sequence_parallel=True, recompute="mixed"),
    trial("llama", dtype=FP32, cp=2),
    trial("gpt2", dtype=FP32, cp=2, heads=True),
    trial("mixtral", dp_replicate=2, ep=2),
    trial("deepseekv3", dp_replicate=2, ep=2, recompute="selective"),
    trial("qwen3moe", dp_shard=2, ep=2, zero_stage=3),
    trial("mixtral", tp=2),
    trial("llama", dtype=FP32, pp=2, num_microbatches=2, recompute="full"),
    trial(
        "gpt2", dtype=FP32, pp=2, num_microbatches=4, num_virtual_stages=2, schedule="InterleavedZeroBubble"
    ),
]


INDUCTOR_FORMS = [
    trial("mlp", dtype=FP32, tp=2),
    trial("mlp", dtype=FP32, dp_shard=2, zero_stage=3),
    trial("mixtral", dp_replicate=2, ep=2),
]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("form", "backend"),
    [*((form, "aot_eager") for form in FORMS), *((form, "inductor") for form in INDUCTOR_FORMS)],
    ids=str,
)
def test_compiled_programs_equal_eager_ones(form: Trial, backend: str, tmp_path: Path) -> None:
    """With `aot_eager`, forward and backward are traced as for inductor, and run by torch's own kernels."""
    outcome = shared_pool().run(DRIVER, 2, prepare(form, tmp_path), backend)
    assert (outcome.verdict, outcome.output) == ("equal", "")
