"""Fixtures that more than one package's tests use."""

from __future__ import annotations

import pytest

from autopar.plan import (
    Alternative,
    Certificate,
    ClusterSummary,
    ModelSummary,
    Parallelism,
    Plan,
    Prediction,
    StagePlan,
)
from costmodel import optimizer_policy

GB = 1e9
STEP_S = 2.0
TERMS_S = {
    "compute": 1.2,
    "recompute": 0.4,
    "tensor_parallel": 0.2,
    "pipeline_bubble": 0.1,
    "gradient_sync": 0.1,
}
FLOPS_PER_S = 9.868e13
"""Of the model, on each device."""

CLUSTER = ClusterSummary(
    id="dgx-h100*8",
    name="8 x NVIDIA DGX H100",
    device="h100-sxm",
    num_devices=64,
    devices_per_node=8,
    memory_bytes=80.0 * GB,
    peak_flops_per_s=989e12,
)
MODEL = ModelSummary(
    name="llama3-8b",
    fingerprint="0" * 64,
    num_parameters=8_030_261_248,
    dtype="bf16",
    input_shapes={"input_ids": (1, 4096), "labels": (1, 4096)},
    tokens_per_sample=4096,
    num_ops=900,
    flops_per_sample=6.5e13,
)


@pytest.fixture
def plan() -> Plan:
    """A plan made by hand: an 8-billion-parameter model on 64 devices, two stages, numbers easy to check."""
    p = Parallelism(pp=2, dp_shard=4, tp=8, zero_stage=1, num_microbatches=16, recompute="full")
    return Plan(
        model=MODEL,
        cluster=CLUSTER,
        parallelism=p,
        policy=optimizer_policy("adamw-mixed"),
        strategies={
            "dp": {"embedding": "b", "linear": "b"},
            "tp": {"embedding": "v", "linear": "o", "linear_1": "h", "rms_norm": "s"},
        },
        stages=(
            _stage(0, "embedding", ("model.embed_tokens", "model.layers.0..15"), 0.02, 0.06, 20.0),
            _stage(1, "linear_112", ("model.layers.16..31", "model.norm", "lm_head"), 0.025, 0.07, 30.0),
        ),
        prediction=Prediction(
            software="torch-eager",
            step_s=STEP_S,
            terms_s=TERMS_S,
            tokens_per_s=p.global_batch * MODEL.tokens_per_sample / STEP_S,
            model_flops_per_s_per_device=FLOPS_PER_S,
            mfu=FLOPS_PER_S / CLUSTER.peak_flops_per_s,
            peak_memory_bytes=50.0 * GB,
            single_device_step_s=100.0,
        ),
        certificate=Certificate(
            status="optimal", objective_s=STEP_S, bound_s=1.9, num_candidates=120, num_solved=30,
            pruned={"bound": 90},
        ),
        alternatives=(
            Alternative(
                label="DDP", parallelism=Parallelism(dp_replicate=64), step_s=None,
                peak_memory_bytes=140.0 * GB, reason="out of memory by 60.0 GB",
            ),
            Alternative(
                label="FSDP", parallelism=Parallelism(dp_shard=64, zero_stage=3), step_s=2.5,
                peak_memory_bytes=60.0 * GB, reason="1.25x slower: parameter gathers +0.6 s",
            ),
        ),
    )  # fmt: skip


def _stage(
    index: int,
    first_op: str,
    modules: tuple[str, ...],
    forward_s: float,
    backward_s: float,
    activations_gb: float,
) -> StagePlan:
    held_gb = {"parameters": 8.0, "optimizer": 12.0, "activations": activations_gb}
    return StagePlan(
        index=index,
        first_op=first_op,
        modules=modules,
        forward_s=forward_s,
        backward_s=backward_s,
        memory_bytes={name: size * GB for name, size in held_gb.items()},
    )
