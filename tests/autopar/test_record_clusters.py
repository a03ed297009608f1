"""From a published record to its cluster."""

from __future__ import annotations

import pytest

from autopar.records.clusters import cluster_of
from autopar.records.schema import Record, RecordError
from hardware_db import UnknownHardwareError
from tests.autopar.record_cases import RECORDS, changed, every_record, of_group


@every_record
def test_clusters_have_exactly_the_devices(record: Record):
    cluster = cluster_of(record)
    assert cluster.num_devices == record.cluster.n_devices
    assert cluster.devices_per_node == min(record.cluster.devices_per_node, record.cluster.n_devices)


@pytest.mark.parametrize(
    ("group", "device", "inside", "gbit_per_s_per_device"),
    [
        # devices that reach each other at scale-up rate, and the network's share of each of them
        ("megatron-sc21-table1", "a100-sxm-80gb", 8, 200),  # 8x HDR200
        ("vtrain-multi-3.6B-39B", "a100-sxm-80gb", 8, 100),  # 4x HDR200
        ("bloom-early", "a100-sxm-80gb", 8, 50),  # 4x Omni-Path 100
        ("internevo", "a100-sxm-80gb", 8, 50),  # 4x 100Gb RoCE
        ("llm-foundry-h100", "h100-sxm", 8, 400),  # not stated, 3200 Gbps per node typical
        ("megatron-2020-readme", "v100-sxm2-32gb", 2, None),  # two of a node's 16
        ("megatron-bridge-gptoss120b", "gb300", 64, None),  # 64 of a rack's 72
        ("trillium-llama3", "tpu-v6e", 8, None),  # one slice
        ("maxtext-v4", "tpu-v4", 64, 50),  # 8 slices of 64
        ("maxtext-v5p", "tpu-v5p", 128, 50),  # 2 slices of 128
    ],
)
def test_clusters_have_the_links_of_the_words(
    group: str, device: str, inside: int, gbit_per_s_per_device: float | None
):
    cluster = cluster_of(of_group(group))
    assert cluster.device.id == device
    *inner, outermost = cluster.levels
    if gbit_per_s_per_device is None:
        assert outermost.num_devices == inside
        assert outermost.name != "network"
    else:
        assert outermost.name == "network"
        assert inner[-1].num_devices == inside
        assert outermost.line_rate_bytes_per_s == pytest.approx(gbit_per_s_per_device * 1e9 / 8)


def test_rates_per_device_and_unstated_ones():
    titan = RECORDS["titan-405b-4d-cp2"]
    cluster = cluster_of(titan)
    assert cluster.device.memory_bandwidth_bytes_per_s == 2.4e12
    assert cluster.levels[-1].line_rate_bytes_per_s == 50e9
    unstated = changed(titan, cluster={"accelerator": "H100-80GB", "inter_node_link": None})
    assert cluster_of(unstated).levels[-1].line_rate_bytes_per_s == 50e9, "that of the catalogue's node"


def test_a_rack_is_cut_into_even_domains():
    record = changed(of_group("megatron-bridge-gptoss120b"), cluster={"n_devices": 256})
    domain, network = cluster_of(record).levels
    assert (domain.num_devices, network.num_devices) == (64, 256)
    assert network.line_rate_bytes_per_s == 100e9


def test_slices_of_a_torus_are_compact_boxes():
    levels = cluster_of(of_group("maxtext-v5p")).levels
    assert [level.num_devices for level in levels] == [4, 16, 128, 256]  # 4 x 4 x 8, twice


def test_a_card_without_a_catalogue_node_gets_one():
    record = changed(
        of_group("bloom-early"), cluster={"accelerator": "rtx-3090", "n_devices": 16, "devices_per_node": 4}
    )
    cluster = cluster_of(record)
    assert cluster.devices_per_node == 4
    assert cluster.levels[-1].line_rate_bytes_per_s == 12.5e9


def test_unknown_accelerators_are_refused_with_a_guess():
    record = changed(of_group("internevo"), cluster={"accelerator": "A100-800GB"})
    with pytest.raises(UnknownHardwareError, match="did you mean 'a100-80gb'"):
        cluster_of(record)


def test_devices_must_fill_nodes():
    record = changed(of_group("internevo"), cluster={"n_devices": 12})
    with pytest.raises(RecordError, match="12 devices in 1 slices do not fill nodes of 8"):
        cluster_of(record)
