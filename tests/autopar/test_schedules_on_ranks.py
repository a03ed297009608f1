"""Every pipeline schedule of torch, as emitted, does what the original model does in one process.

With stages cut anywhere, skip connections, tied parameters, recomputation, and ZeRO and tensor parallelism
inside; batch norms have the statistics of all samples, and gradients are clipped by the norm of the whole
model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from costmodel.orders import SPLIT_BACKWARD_SCHEDULES
from tests.autopar.programs_on_ranks import Trial, failures, trial

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NORMS = Path(__file__).with_name("norms_on_ranks.py")

LOOPS = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
SEVERAL = (*LOOPS, "ZBVZeroBubble", "DualPipeV")
"""Schedules with several stages on a rank."""


def staged(model: str, schedule: str, *, cuts: int | None = None, **degrees: Any) -> Trial:
    """A trial with two stages on each of two ranks."""
    degrees = {"num_microbatches": 4, "num_virtual_stages": 2, "pp": 2, **degrees}
    return trial(
        model, 0 if degrees.get("recompute") == "mixed" else None, cuts=cuts, schedule=schedule, **degrees
    )


def split(model: str, **degrees: Any) -> list[Trial]:
    """Trials of the schedules that compute the gradients of weights apart."""
    return [staged(model, schedule, **degrees) for schedule in sorted(SPLIT_BACKWARD_SCHEDULES)]


TWO_RANKS = {
    "embeddings that are the head too": [staged("gpt2", schedule) for schedule in SEVERAL],
    "an embedding of encoder, decoder and head": [staged("t5", schedule) for schedule in SEVERAL],
    "skips past stages": [staged("unet", schedule) for schedule in SEVERAL],
    "uneven loops": [
        staged("llama", "Interleaved1F1B", num_virtual_stages=3, num_microbatches=2, cuts=0),
        *(staged("whisper", schedule, cuts=index) for index, schedule in enumerate(LOOPS)),
    ],
    "blocks computed again": [
        *split("gpt2", recompute="full"),
        *split("llama", recompute="selective"),
        *split("gpt2", recompute="mixed"),
    ],
    "batch norms": [
        trial("resnet", dp_replicate=2, recompute="selective"),
        trial("resnet", dp_shard=2, zero_stage=3, num_microbatches=2),
        *(trial("resnet", seed, tp=2) for seed in range(2)),
        trial("resnet", pp=2, num_microbatches=2, recompute="full"),
        staged("resnet", "ZBVZeroBubble", recompute="selective"),
    ],
    "cuts anywhere": [
        trial("bert", cuts=1, pp=2, num_microbatches=2),
        trial("clip", cuts=2, pp=2, num_microbatches=2, schedule="GPipe"),
        trial("mixtral", cuts=3, pp=2, num_microbatches=2),
        *(staged(model, "ZBVZeroBubble", cuts=4) for model in ("deepseekv3", "resnet", "mamba", "dlrm")),
        *(staged(model, "DualPipeV", cuts=5) for model in ("mixtral", "bart", "unet", "vit")),
    ],
}

FOUR_RANKS = {
    "zero": [
        *split("gpt2", dp_shard=2, zero_stage=3, recompute="full"),
        *(staged("gpt2", schedule, dp_shard=2, zero_stage=2) for schedule in SEVERAL),
        staged("clip", "ZBVZeroBubble", dp_shard=2, zero_stage=1),
    ],
    "tensor parallel": [
        *(staged("gpt2", schedule, tp=2) for schedule in SEVERAL),
        *split("llama", tp=2, recompute="selective"),
    ],
    "replicas": [
        staged("gpt2", "ZBVZeroBubble", dp_replicate=2),
        staged("t5", "DualPipeV", dp_replicate=2),
        staged("bert", "InterleavedZeroBubble", dp_replicate=2),
    ],
    "four stages": [
        trial("t5", pp=4, num_microbatches=4),
        trial("unet", pp=4, num_microbatches=2, schedule="GPipe", cuts=6),
        staged("llama", "ZBVZeroBubble", pp=4, num_microbatches=8, cuts=7),
        staged("gpt2", "DualPipeV", pp=4, num_microbatches=8, cuts=8),
    ],
    "batch norms": [
        *(trial("resnet", seed, dp_replicate=2, tp=2) for seed in range(2)),
        trial("resnet", dp_shard=2, pp=2, zero_stage=2, num_microbatches=2),
    ],
    "a scalar under zero": [
        trial("clip", dp_shard=4, zero_stage=3),
        trial("clip", dp_replicate=2, dp_shard=2, zero_stage=2, num_microbatches=2),
    ],
}

CLIPPED = [
    staged("gpt2", "ZBVZeroBubble", dp_shard=2, zero_stage=3),
    staged("gpt2", "Interleaved1F1B", tp=2),
    staged("t5", "DualPipeV", tp=2),
    trial("gpt2", dp_replicate=2, pp=2, num_microbatches=2),
    trial("llama", dp_shard=2, tp=2, zero_stage=3),
    trial("gpt2", dp_replicate=2, tp=2),
    trial("clip", dp_replicate=2, dp_shard=2, zero_stage=2),
]


@pytest.mark.parametrize("trials", TWO_RANKS.values(), ids=TWO_RANKS)
def test_on_two_ranks(trials: list[Trial], tmp_path: Path) -> None:
    assert not failures(trials, 2, tmp_path)


@pytest.mark.parametrize("trials", FOUR_RANKS.values(), ids=FOUR_RANKS)
def test_on_four_ranks(trials: list[Trial], tmp_path: Path) -> None:
    assert not failures(trials, 4, tmp_path)


def test_gradients_are_clipped_by_the_norm_of_the_whole_model(tmp_path: Path) -> None:
    assert not failures(CLIPPED, 4, tmp_path, NORMS)
