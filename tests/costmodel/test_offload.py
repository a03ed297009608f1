"""Offloaded optimizer states against closed forms and the figures of ZeRO-Offload (arXiv:2101.06840)."""

from __future__ import annotations

from dataclasses import replace

import pytest

import hardware_db
from costmodel import (
    CostModelError,
    HostUpdate,
    check_host,
    host_bytes_per_parameter,
    model_state_ledger,
    offloaded_update,
    on_device,
    optimizer_policies,
    optimizer_policy,
)
from hardware_db import Cluster

GB = 1e9
MIXED = optimizer_policy("adamw-mixed")


def host(link_bytes_per_s: float = 10 * GB, memory_bytes_per_s: float = 100 * GB) -> Cluster:
    return replace(
        hardware_db.cluster("dgx-a100"),
        host_link_bytes_per_s_per_device=link_bytes_per_s,
        host_memory_bytes_per_s_per_device=memory_bytes_per_s,
    )


def test_gradients_go_down_and_parameters_come_up_over_the_link() -> None:
    update = offloaded_update(5e9, MIXED, host())
    assert update.down_s == pytest.approx(5e9 * 2 / 10e9)
    assert update.up_s == pytest.approx(5e9 * 2 / 10e9)


@pytest.mark.parametrize(
    ("num_parameters", "measured_s"), [(1e9, 0.22), (2e9, 0.51), (4e9, 1.03), (10e9, 2.57)]
)
def test_an_update_takes_what_the_paper_measured_on_a_dgx2(num_parameters: float, measured_s: float) -> None:
    """The table of CPU-Adam latencies, one process with all of the host: 256 GB/s."""
    dgx_2 = hardware_db.cluster("dgx-2")
    assert dgx_2.host_memory_bytes_per_s_per_device is not None
    whole = dgx_2.host_memory_bytes_per_s_per_device * dgx_2.num_devices
    predicted_s = offloaded_update(num_parameters, MIXED, host(memory_bytes_per_s=whole)).update_s
    assert predicted_s == pytest.approx(measured_s, rel=0.2)


def test_what_is_exposed_is_what_neither_the_backward_nor_the_update_hides() -> None:
    slow_host, slow_link = HostUpdate(2.0, 5.0, 1.0), HostUpdate(2.0, 1.0, 3.0)
    assert slow_host.exposed_s() == 7.0
    assert slow_host.exposed_s(behind_s=1.5) == 5.5
    assert slow_host.exposed_s(behind_s=100.0) == 5.0
    assert slow_link.exposed_s(behind_s=100.0) == 3.0


@pytest.mark.parametrize(
    ("policy", "device_bytes", "host_bytes"),
    [
        ("adamw-mixed", 4, 14),  # bf16 parameter and gradient; master, two moments and the gradient
        ("adamw-mixed-fp32-gradients", 6, 16),
        ("adamw-sharded-fp32", 6, 16),  # the fp32 parameter is the master copy
        ("adamw-fp32", 8, 16),  # a copy of the parameter is updated in the host
        ("sgd-fp32", 8, 8),
    ],
)
def test_states_leave_the_device(policy: str, device_bytes: float, host_bytes: float) -> None:
    left = on_device(optimizer_policy(policy))
    assert model_state_ledger(1, left).total_bytes == device_bytes
    assert host_bytes_per_parameter(optimizer_policy(policy)) == host_bytes


@pytest.mark.parametrize("name", optimizer_policies())
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_offloading_never_takes_more_of_the_device(name: str, zero_stage: int) -> None:
    policy = optimizer_policy(name)
    kept = model_state_ledger(1e9, policy, zero_stage, 8)
    left = model_state_ledger(1e9, on_device(policy), zero_stage, 8)
    assert left.optimizer_bytes == 0
    assert left.total_bytes <= kept.total_bytes


def test_devices_share_their_host() -> None:
    """Two A100 share a PCIe 4 switch and eight the memory; two Blackwells share a Grace."""
    a100, gb200 = (
        check_host(hardware_db.cluster("dgx-a100*2")),
        check_host(hardware_db.cluster("gb200-nvl72")),
    )
    assert a100.link_bytes_per_s == pytest.approx(31e9 * 0.77 / 2)
    assert (a100.memory_bytes_per_s, a100.memory_bytes) == (409.6e9 / 8, 2e12 / 8)
    assert gb200.link_bytes_per_s == pytest.approx(450e9 * 0.83 / 2)
    assert (gb200.memory_bytes_per_s, gb200.memory_bytes) == (500e9 / 2, 480e9 / 2)


def test_a_host_that_nobody_described_is_refused_by_name() -> None:
    with pytest.raises(
        CostModelError,
        match=r"cannot be offloaded on .*nothing is known of host_memory_bytes_per_s_per_device; give that",
    ):
        check_host(hardware_db.cluster("tpu-v5e-host"))
    with pytest.raises(CostModelError, match="host_link_bytes_per_s_per_device"):
        offloaded_update(1e9, MIXED, hardware_db.cluster("local-cpu"))


def test_a_cluster_file_describes_the_host() -> None:
    own = hardware_db.parse_cluster(
        {
            "node": "tpu-v5e-host",
            "host_memory_bytes_per_s_per_device": 40e9,
            "host_link_bytes_per_s_per_device": 12e9,
        }
    )
    assert check_host(own)[:2] == (12e9, 40e9)
    assert check_host(hardware_db.parse_cluster(hardware_db.cluster_document(own))) == check_host(own)
