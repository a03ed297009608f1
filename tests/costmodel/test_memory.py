from __future__ import annotations

import pytest
import torch

from costmodel import CostModelError, Ledger, model_state_ledger, optimizer_policies, optimizer_policy
from costmodel.memory import usual_policy
from costmodel.software import software_eras

GB = 1e9


@pytest.mark.parametrize(
    ("zero_stage", "num_devices", "published_gb"),
    [
        # ZeRO, arXiv:1910.02054: figure 1 and table 1, 7.5 B parameters.
        (0, 64, 120),
        (1, 64, 31.4),
        (2, 64, 16.6),
        (3, 64, 1.88),
        (1, 4, 52.5),
        (2, 4, 41.3),
        (3, 4, 30),
        (1, 1024, 30.1),
        (2, 1024, 15.1),
        (3, 1024, 0.12),
    ],
)
def test_zero_paper(zero_stage: int, num_devices: int, published_gb: float) -> None:
    ledger = model_state_ledger(7.5e9, "adamw-mixed", zero_stage, num_devices)
    assert ledger.total_bytes / GB == pytest.approx(published_gb, abs=0.06)


@pytest.mark.parametrize("name", optimizer_policies())
def test_one_shard_is_the_whole_whatever_the_stage(name: str) -> None:
    whole = model_state_ledger(1e9, name)
    assert all(model_state_ledger(1e9, name, stage, 1) == whole for stage in range(4))


def test_each_stage_shards_one_more_state() -> None:
    ledgers = [model_state_ledger(1e9, "adamw-mixed", stage, 8) for stage in range(4)]
    assert [x.optimizer_bytes / GB for x in ledgers] == [12, 1.5, 1.5, 1.5]
    assert [x.gradients_bytes / GB for x in ledgers] == [2, 2, 0.25, 0.25]
    assert [x.parameters_bytes / GB for x in ledgers] == [2, 2, 2, 0.25]


def test_policies_hold_what_torch_optimizers_hold() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.zeros(1000)
    optimizers = {
        "adamw-fp32": torch.optim.AdamW([parameter]),
        "sgd-fp32": torch.optim.SGD([parameter]),
        "sgd-momentum-fp32": torch.optim.SGD([parameter], momentum=0.9),
    }
    for name, optimizer in optimizers.items():
        optimizer.step()
        states = optimizer.state[parameter].values()
        held = sum(s.nbytes for s in states if isinstance(s, torch.Tensor) and s.numel() > 1)
        assert model_state_ledger(1000, name).optimizer_bytes == held


@pytest.mark.parametrize(
    ("software", "precision", "zero_stage", "fsdp", "shards", "per_parameter"),
    [
        # Megatron-LM, docs/source/api-guide/dist_optimizer: "Theoretical memory usage", bytes a parameter.
        ("te-2024", "bf16", 0, False, 1, 18),
        ("te-2024", "bf16", 1, False, 8, 6 + 12 / 8),
        ("unfused-2020", "fp16", 0, False, 1, 18),
        # ZeRO-3 on fp32 parameters, which are their own master copy.
        ("flash-2023", "bf16", 3, True, 8, 16 / 8),
        # FSDP2 with reshard_after_forward=False: a bf16 copy of the parameters is whole, too.
        ("flash-2023", "bf16", 2, True, 8, 2 + 16 / 8),
        ("xla", "bf16", 3, True, 8, 14 / 8),
        ("te-2024", "fp8", 0, False, 1, 18),
    ],
)
def test_what_runs_usually_keep(
    software: str, precision: str, zero_stage: int, fsdp: bool, shards: int, per_parameter: float
) -> None:
    policy = usual_policy(software, precision, zero_stage, fsdp=fsdp)
    ledger = model_state_ledger(1e9, policy, zero_stage, shards)
    assert ledger.total_bytes / 1e9 == pytest.approx(per_parameter)


@pytest.mark.parametrize("software", software_eras())
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4"])
def test_every_run_has_a_policy(software: str, precision: str) -> None:
    for fsdp in (False, True):
        assert usual_policy(software, precision, fsdp=fsdp).name in optimizer_policies()


def test_ledgers_add_by_entry() -> None:
    states = model_state_ledger(1e9, "adamw-fp32")
    more = Ledger(
        activations_bytes=5, logits_bytes=7, fragmentation_bytes=2, reserved_bytes=11, moment="forward"
    )
    total = states + more
    assert (total.parameters_bytes, total.activations_bytes, total.moment) == (4e9, 5, "forward")
    assert total.total_bytes == sum(total.entries.values()) == states.total_bytes + 25
    assert (total.allocated_bytes, total.cached_bytes) == (states.total_bytes + 12, states.total_bytes + 14)


def test_an_update_reads_everything_and_writes_parameters_and_states() -> None:
    # 2 + 12 bytes read and written, 2 bytes of gradient read.
    assert optimizer_policy("adamw-mixed").update_bytes == 2 * 14 + 2


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(CostModelError, match="did you mean adamw-mixed"):
        optimizer_policy("adam-mixed")
    with pytest.raises(CostModelError, match="got 4"):
        model_state_ledger(1e9, "adamw-mixed", zero_stage=4)
    with pytest.raises(CostModelError, match="got 0"):
        model_state_ledger(1e9, "adamw-mixed", zero_stage=1, shard_degree=0)
