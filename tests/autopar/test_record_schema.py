"""The format of published records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autopar.records.schema import Record, RecordError, read_records
from tests.autopar.record_cases import EXCERPT, RECORDS, every_record, of_group


def written(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def entry(**changes: Any) -> dict[str, Any]:
    """The first record of the excerpt as the file has it, with changes to its top fields."""
    return json.loads(EXCERPT.read_text(encoding="utf-8"))["records"][0] | changes


def test_claims_are_not_runs():
    document = json.loads(EXCERPT.read_text(encoding="utf-8"))["records"]
    assert {one["id"] for one in document} - set(RECORDS) == {"claim-gpt3-v100"}


@every_record
def test_step_time_and_token_rate_tell_the_same(record: Record):
    rate = record.tokens_per_s_per_device
    assert rate is not None
    if record.tokens_per_step is None:
        assert record.step_time_s is None
    else:
        assert record.step_time_s is not None
        tokens = record.step_time_s * rate * record.cluster.n_devices
        assert tokens == pytest.approx(record.tokens_per_step, rel=2e-3)


def test_step_time_from_tokens_per_second():
    """Eight devices at 1000 tokens/s each take 2048 * 16 tokens in 4.096 s."""
    fields = entry(measured={"tokens_per_s_per_device": 1000}, derived={})
    fields["cluster"] = fields["cluster"] | {"n_devices": 8}
    fields["batch"] = {"global_batch": 16}
    assert Record.model_validate(fields).step_time_s == pytest.approx(4.096)
    assert Record.model_validate(fields | {"batch": {}}).step_time_s is None


def test_memory_by_rank_and_as_one_figure_agree():
    record = of_group("simumax-b200-llama70b")
    by_rank = record.measured_memory_bytes["allocated"]
    assert len(by_rank) == record.cluster.n_devices
    assert record.memory_kind == "allocated"
    assert record.memory_bytes == max(by_rank)
    assert record.memory_bytes == pytest.approx(record.measured["memory_gib_max_allocated"] * 2**30, rel=1e-3)
    assert record.measured_memory_bytes["reserved"] > (record.memory_bytes,)


@pytest.mark.parametrize(
    ("group", "kind", "num_bytes"),
    [
        ("torchtitan-202412", "reserved", 82.4 * 2**30),
        ("bloom-early", "device", 33e9),
        ("colossalai", "reserved", 119040 * 2**20),
        ("vtrain-single", None, None),
    ],
)
def test_memory_in_the_units_of_its_name(group: str, kind: str | None, num_bytes: float | None):
    record = of_group(group)
    assert record.memory_kind == kind
    assert record.memory_bytes == (num_bytes if num_bytes is None else pytest.approx(num_bytes))


def test_out_of_memory_runs_need_no_figures(tmp_path: Path):
    path = written(tmp_path, [entry(tier="oom", measured={}, derived={})])
    (record,) = read_records(path)
    assert record.out_of_memory
    assert record.step_time_s is None
    assert record.tokens_per_s_per_device is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"layers": "many"}}, r"record sc21-t1-1\.7B: model\.layers: got 'many' \(str\), expected"),
        (
            {"cluster": {"accelerator": "A100"}},
            r"cluster\.n_devices is missing; cluster\.devices_per_node is",
        ),
        ({"tier": "Z"}, r"tier: got 'Z' \(str\), expected 'A', 'B', 'C' or 'oom'"),
        ({"id": None}, r"record records\[0\]: id: got None"),
    ],
)
def test_a_bad_record_is_named_with_its_field(tmp_path: Path, changes: dict[str, Any], message: str):
    path = written(tmp_path, {"records": [entry(**changes)]})
    with pytest.raises(RecordError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)


def test_unknown_fields_are_ignored(tmp_path: Path):
    path = written(tmp_path, [entry(weather="fine")])
    assert read_records(path) == (RECORDS["sc21-t1-1.7B"],)


def test_a_bad_file_says_what_is_wrong(tmp_path: Path):
    with pytest.raises(RecordError, match="cannot be read"):
        read_records(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(RecordError, match="is not JSON"):
        read_records(tmp_path / "broken.json")
    with pytest.raises(RecordError, match="expected an object with a list `records`"):
        read_records(written(tmp_path, {"runs": []}))
