"""The eras of software: data that loads, with a source for every number, and that tells time in order."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from importlib.resources import files
from typing import Any

import pytest

from costmodel import CostModelError, Software, software, software_eras

DATA: dict[str, Any] = json.loads(files("costmodel").joinpath("data", "software.json").read_text())
TABLES = {"shared": DATA["shared"], **DATA["eras"]}
SHARES = ("matmul_share", "memory_share", "attention_share", "attention_backward_share", "collective_share")
OVERLAPS = (
    "gradient_sync_overlap", "parameter_gather_overlap", "tensor_parallel_overlap",
    "async_tensor_parallel_overlap",
)  # fmt: skip


@pytest.mark.parametrize("name", software_eras())
def test_every_era_is_whole_and_sensible(name: str) -> None:
    era = software(name)
    assert era.name == name
    assert era.attention in ("unfused", "flash", "native")
    assert era.fusion in ("none", "module", "chain")
    for share in SHARES:
        # Above one only where the device's own share stands below what it can do.
        assert 0 < getattr(era, share) <= 1.5, share
    for part in (*OVERLAPS, "contention", "fragmentation"):
        assert 0 <= getattr(era, part) <= 1, part
    for host_s in (era.host_s_per_launch, era.host_s_per_collective):
        assert 0 <= host_s < 1e-3
    assert 0 <= era.step_overhead_s < 1
    for field in fields(Software):
        if field.type == "bool":
            assert isinstance(getattr(era, field.name), bool), field.name


@pytest.mark.parametrize("name", TABLES)
def test_every_number_has_a_source_and_is_one_that_software_has(name: str) -> None:
    known = {field.name for field in fields(Software)} - {"name"}
    for key, fact in TABLES[name].items():
        assert key in known, f"{key} is read by nobody"
        assert fact.keys() <= {"value", "source", "confidence", "note"}
        assert isinstance(fact["source"], str)
        assert fact["source"].strip()


def test_what_an_era_does_not_say_is_shared() -> None:
    for name, own in DATA["eras"].items():
        era = software(name)
        for key, fact in {**DATA["shared"], **own}.items():
            assert getattr(era, key) == fact["value"]


def test_products_beside_their_collectives_hide_no_less() -> None:
    eager, newest = software("torch-eager"), software("te-2026")
    assert eager.tensor_parallel_exposed == 1.0
    assert eager.with_async_tensor_parallelism.tensor_parallel_exposed == pytest.approx(0.63)
    assert newest.with_async_tensor_parallelism == newest


def test_no_software_hides_all() -> None:
    assert 0 < replace(software("torch-eager"), tensor_parallel_overlap=1.0).tensor_parallel_exposed < 0.01


def test_an_unknown_era_is_answered_with_those_that_sound_alike_or_with_all() -> None:
    with pytest.raises(CostModelError, match=r"unknown software 'flash-2032'; did you mean flash-2023"):
        software("flash-2032")
    with pytest.raises(CostModelError, match=", ".join(software_eras())):
        software("???")


def test_attention_is_fused_before_it_is_native() -> None:
    """The order of time, by the kernel that Megatron-LM had: softmax over scores in memory, then
    FlashAttention (2022), then cuDNN's and FlashAttention-3 (2024)."""
    assert software("unfused-2020").attention == "unfused"
    assert software("flash-2023").attention == "flash"
    assert {software(name).attention for name in ("te-2024", "te-2026", "xla")} == {"native"}
