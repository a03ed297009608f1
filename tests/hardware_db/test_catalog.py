"""The catalogue: complete, sourced, and right where published numbers can be checked by eye."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
from pydantic import ValidationError

import hardware_db
from hardware_db import HardwareError, MissingFactError, UnknownHardwareError, catalog, facts_of
from hardware_db.schema import Accelerator, ClusterEntry, Node

REQUIRED_ACCELERATORS = [
    "v100",
    "a100-40gb",
    "a100-80gb",
    "h100",
    "h200",
    "h800",
    "h20",
    "b200",
    "mi300x",
    "tpu-v4",
    "tpu-v5e",
    "tpu-v5p",
    "tpu-v6e",
    "mlu370-x8",
    "mlu590",
    "ascend-910b",
    "cpu",
]
REQUIRED_NODES = [
    "dgx-1v",
    "dgx-a100",
    "dgx-h100",
    "dgx-b200",
    "gb200-nvl72",
    "tpu-v4-host",
    "mlu370-x8-server",
    "atlas-800-9000",
    "atlas-800t-a2",
    "local-cpu",
]


def stored_records() -> list[Accelerator | Node | ClusterEntry]:
    return [
        *(catalog.accelerator(id) for id in catalog.accelerators()),
        *(catalog.node(id) for id in catalog.nodes()),
        *(catalog.cluster_entry(id) for id in catalog.clusters()),
    ]


@pytest.mark.parametrize("name", REQUIRED_ACCELERATORS)
def test_required_accelerators_resolve(name: str) -> None:
    card = hardware_db.accelerator(name)
    assert name in (card.id, *card.aliases)


@pytest.mark.parametrize("name", REQUIRED_NODES)
def test_required_nodes_resolve_to_clusters(name: str) -> None:
    assert hardware_db.cluster(name).num_devices >= 1


def test_every_number_cites_a_listed_source() -> None:
    known = set(hardware_db.sources())
    cited = {fact.source for record in stored_records() for _, fact in facts_of(record) if fact.source}
    assert cited <= known
    for record in (*catalog.links().values(), catalog.collective_facts()):
        assert {fact.source for _, fact in facts_of(record) if fact.source} <= known
    assert {table.source for table in catalog.collective_facts().tables} <= known


def test_collective_facts_name_what_is_in_the_catalog() -> None:
    facts = catalog.collective_facts()
    named = {id for reduction in facts.reductions for id in reduction.accelerators}
    assert named | {id for table in facts.tables for id in table.accelerators} <= set(catalog.accelerators())
    assert {id for table in facts.tables for id in table.nodes} <= set(catalog.nodes())


def test_no_number_in_the_data_stands_outside_a_fact() -> None:
    structural = {"logical_devices_per_card", "torus_axes"}

    def bare_numbers(value: object, key: str) -> list[str]:
        if isinstance(value, dict):
            if "value" in value:
                return []
            return [found for name, item in value.items() for found in bare_numbers(item, name)]
        if isinstance(value, list):
            return [found for item in value for found in bare_numbers(item, key)]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return [key] if number and key not in structural else []

    data = files("hardware_db") / "data"
    folders = (data / "accelerators", data / "nodes", data / "clusters")
    paths = [
        *(path for folder in folders for path in folder.iterdir()),
        data / "links.json",
        data / "efficiency.json",
    ]
    assert len(paths) > 100
    for path in paths:
        assert bare_numbers(json.loads(path.read_text()), path.name) == []


@pytest.mark.parametrize("kind", ["accelerators", "nodes", "clusters"])
def test_file_names_are_ids_and_no_name_means_two_things(kind: str) -> None:
    ids = {"accelerators": catalog.accelerators, "nodes": catalog.nodes, "clusters": catalog.clusters}[kind]()
    files_of_kind = (files("hardware_db") / "data" / kind).iterdir()
    assert list(ids) == sorted(path.name.removesuffix(".json") for path in files_of_kind)
    names = catalog.names_of(ids, kind.removesuffix("s"))
    assert len(names) == len(set(names))


def test_nodes_and_named_clusters_do_not_share_names() -> None:
    nodes = catalog.names_of(catalog.nodes(), "node")
    assert not set(nodes) & set(catalog.names_of(catalog.clusters(), "cluster"))


@pytest.mark.parametrize(
    ("name", "dtype", "flops_per_s"),
    [
        ("h100", "bf16", 989.4e12),
        ("h100", "fp8", 1978.9e12),
        ("a100", "bf16", 312e12),
        ("a100", "tf32", 156e12),
        ("v100", "fp16", 125e12),
        ("h20", "bf16", 148e12),
        ("b200", "bf16", 2250e12),
        ("mi300x", "bf16", 1307.4e12),
        ("tpu-v4", "bf16", 275e12),
        ("tpu-v5e", "bf16", 197e12),
        ("tpu-v5p", "bf16", 459e12),
        ("tpu-v6e", "bf16", 918e12),
        ("mlu370-x8", "bf16", 96e12),
    ],
)
def test_published_dense_peaks(name: str, dtype: str, flops_per_s: float) -> None:
    assert hardware_db.accelerator(name).peak_flops_per_s(dtype) == pytest.approx(flops_per_s, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "memory_bytes", "bytes_per_s"),
    [
        ("h100", 80e9, 3.35e12),
        ("h200", 141e9, 4.8e12),
        ("a100-80gb", 80e9, 2.039e12),
        ("a100-40gb", 40e9, 1.555e12),
        ("mi300x", 192e9, 5.3e12),
        ("tpu-v4", 32 * 2**30, 1.2e12),
    ],
)
def test_published_memories(name: str, memory_bytes: float, bytes_per_s: float) -> None:
    card = hardware_db.accelerator(name)
    assert card.memory_bytes == memory_bytes
    assert card.memory_bandwidth_bytes_per_s == bytes_per_s


def test_published_links() -> None:
    # NVLink 4: 900 GB/s in both directions together. DGX H100: eight ConnectX-7 of 400 Gbit/s.
    assert hardware_db.accelerator("h100").scale_up.total_bytes_per_s.value == 450e9
    nics = hardware_db.node("dgx-h100").scale_out
    assert (nics.num_nics.value, nics.gbit_per_s_per_nic.value) == (8, 400)


def test_links_of_a_card_add_up() -> None:
    for id in catalog.accelerators():
        link = catalog.accelerator(id).scale_up
        numbers = (link.num_links.value, link.link_bytes_per_s.value, link.total_bytes_per_s.value)
        if None not in numbers:
            count, each, total = (number or 0.0 for number in numbers)
            assert count * each == pytest.approx(total, rel=0.02), id


def test_names_are_forgiving_about_case_and_separators() -> None:
    assert hardware_db.accelerator(" H100_SXM ") is hardware_db.accelerator("h100-sxm")


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UnknownHardwareError, match=r"unknown accelerator 'h1000'; did you mean .*'h100'"):
        hardware_db.accelerator("h1000")
    with pytest.raises(UnknownHardwareError, match="did you mean 'dgx-a100'"):
        hardware_db.node("dgxa100")
    with pytest.raises(UnknownHardwareError, match=r"unknown accelerator 'zzz' \("):
        hardware_db.accelerator("zzz")


def test_a_missing_number_is_named() -> None:
    mlu590 = hardware_db.accelerator("mlu590")
    with pytest.raises(MissingFactError, match=r"mlu590: peak_dense_flops_per_s\.bf16 is unknown"):
        mlu590.peak_flops_per_s("bf16")
    with pytest.raises(MissingFactError, match=r"mlu590: memory\.capacity_bytes is unknown"):
        _ = mlu590.memory_bytes


def test_dtypes_fall_back_to_what_can_stand_in_for_them() -> None:
    v100, a100 = hardware_db.accelerator("v100"), hardware_db.accelerator("a100")
    assert v100.executed_dtype("bf16") == "fp16"
    assert v100.executed_dtype("tf32") == "fp32"
    assert a100.executed_dtype("fp8") == "bf16"
    assert hardware_db.accelerator("cpu").executed_dtype("fp16") == "bf16"
    with pytest.raises(MissingFactError, match="fp64"):
        hardware_db.accelerator("tpu-v4").peak_flops_per_s("fp64")
    with pytest.raises(HardwareError, match=r"unknown dtype 'bf61', expected one of .* did you mean 'bf16'"):
        a100.peak_flops_per_s("bf61")


def test_measured_efficiency_wins_over_vendor_and_kind() -> None:
    h100, h20 = hardware_db.accelerator("h100"), hardware_db.accelerator("h20")
    mi300x = hardware_db.accelerator("mi300x")
    assert mi300x.efficiency.matmul == pytest.approx(668.4 / 1307.4, abs=1e-3)
    assert mi300x.efficiency_facts.matmul.confidence == "derived"
    assert h100.efficiency_facts.matmul.confidence == "fitted"
    assert h20.efficiency_facts.matmul == catalog.efficiency_defaults().vendors["nvidia"].matmul
    assert h20.efficiency_facts.memory == catalog.efficiency_defaults().kinds["gpu"].memory


def test_every_accelerator_has_a_complete_efficiency() -> None:
    for id in catalog.accelerators():
        efficiency = catalog.accelerator(id).efficiency
        assert 0 < efficiency.matmul <= 1
        assert efficiency.reserved_memory_bytes >= 0


def test_a_logical_device_is_an_equal_share() -> None:
    card = hardware_db.accelerator("mi250x")
    die = card.logical_device()
    assert die.peak_flops_per_s("bf16") == card.peak_flops_per_s("bf16") / 2
    assert die.memory_bytes == 64e9
    assert die.memory.capacity_bytes.confidence == "derived"
    assert die.logical_device() is die


def test_accelerators_can_be_keys() -> None:
    h100 = hardware_db.accelerator("h100")
    assert h100.efficiency.matmul > 0  # fills the cache, which must not take part in equality
    assert {h100: 1}[h100.model_copy()] == 1
    assert h100 != hardware_db.accelerator("h200")


@pytest.mark.parametrize(
    ("id", "path"), [("h100-sxm", ()), ("h100-sxm", ("memory",)), ("h100-sxm", ("scale_up",))]
)
def test_unknown_fields_in_a_file_are_rejected(id: str, path: tuple[str, ...]) -> None:
    document = json.loads((files("hardware_db") / "data" / "accelerators" / f"{id}.json").read_text())
    Accelerator.model_validate(document)
    inner = document
    for step in path:
        inner = inner[step]
    inner["colour"] = "green"
    with pytest.raises(ValidationError, match="colour"):
        Accelerator.model_validate(document)
