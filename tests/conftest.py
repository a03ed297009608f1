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

GB = 1e9


@pytest.fixture
def plan() -> Plan:
    """A plan made by hand: an 8-billion-parameter model on 64 devices, two stages, numbers easy to check."""
    parallelism = Parallelism(
        pp=2, dp_shard=4, tp=8, zero_stage=1, microbatch_size=1, num_microbatches=16, recompute="full"
    )
    ledger = {"parameters": 8.0 * GB, "optimizer": 12.0 * GB, "activations": 20.0 * GB}
    stages = (
        StagePlan(
            index=0,
            first_op="embedding",
            modules=("model.embed_tokens", "model.layers.0..15"),
            forward_s=0.02,
            backward_s=0.06,
            memory_bytes=ledger,
        ),
        StagePlan(
            index=1,
            first_op="linear_112",
            modules=("model.layers.16..31", "model.norm", "lm_head"),
            forward_s=0.025,
            backward_s=0.07,
            memory_bytes={"parameters": 8.0 * GB, "optimizer": 12.0 * GB, "activations": 30.0 * GB},
        ),
    )
    terms = {
        "compute": 1.2,
        "recompute": 0.4,
        "tensor_parallel": 0.2,
        "pipeline_bubble": 0.1,
        "gradient_sync": 0.1,
    }
    tokens_per_step = 64 * 4096
    return Plan(
        model=ModelSummary(
            name="llama3-8b",
            fingerprint="0" * 64,
            num_parameters=8_030_261_248,
            dtype="bfloat16",
            input_shapes={"input_ids": (1, 4096), "labels": (1, 4096)},
            tokens_per_sample=4096,
            num_ops=900,
            flops_per_sample=6.5e13,
        ),
        cluster=ClusterSummary(
            id="dgx-h100*8",
            name="8 x NVIDIA DGX H100",
            device="h100-sxm",
            num_devices=64,
            devices_per_node=8,
            memory_bytes=80.0 * GB,
            peak_flops_per_s=989e12,
        ),
        parallelism=parallelism,
        strategies={
            "dp": {"embedding": "b", "linear": "b"},
            "tp": {"embedding": "v", "linear": "o", "linear_1": "h", "rms_norm": "s"},
        },
        stages=stages,
        prediction=Prediction(
            software="torch-eager",
            step_s=2.0,
            terms_s=terms,
            tokens_per_s=tokens_per_step / 2.0,
            model_flops_per_s_per_device=9.868e13,
            mfu=9.868e13 / 989e12,
            peak_memory_bytes=50.0 * GB,
            single_device_step_s=100.0,
        ),
        certificate=Certificate(
            status="optimal",
            objective_s=2.0,
            bound_s=1.9,
            num_candidates=120,
            num_solved=30,
            pruned={"bound": 90},
        ),
        alternatives=(
            Alternative(
                label="DDP",
                parallelism=Parallelism(dp_replicate=64),
                step_s=None,
                peak_memory_bytes=140.0 * GB,
                reason="out of memory by 60.0 GB",
            ),
            Alternative(
                label="FSDP",
                parallelism=Parallelism(dp_shard=64, zero_stage=3),
                step_s=2.5,
                peak_memory_bytes=60.0 * GB,
                reason="1.25x slower: parameter gathers +0.6 s",
            ),
        ),
    )
