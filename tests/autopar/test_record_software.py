"""From a published record to the software that it ran on."""

from __future__ import annotations

import pytest

from autopar.records.configuration import configuration
from autopar.records.schema import RecordError
from autopar.records.software import habits, software_era
from costmodel import software, software_eras
from tests.autopar.record_cases import RECORDS, of_group


@pytest.mark.parametrize(
    ("group", "era"),
    [
        ("megatron-sc21-table1", "unfused-2020"),
        ("korthikanti-table5", "fused-2022"),
        ("vtrain-single", "unfused-2020"),
        ("bloom-early", "unfused-2020"),
        ("llm-foundry-h100", "flash-2023"),
        ("internevo", "flash-2023"),
        ("nemo-24.07", "te-2024"),
        ("simumax-b200-dsv2", "te-2024"),
        ("megatron-bridge-llama3-70b", "te-2026"),
        ("trillium-llama3", "xla"),
    ],
)
def test_eras(group: str, era: str):
    assert software_era(of_group(group)) == era


def test_eager_and_compiled_runs_of_one_source_differ():
    assert software_era(RECORDS["titan-8b-8-eager"]) == "torch-eager"
    assert software_era(RECORDS["titan-8b-8-compile-fp8"]) == "compiled-2024"
    assert software_era(RECORDS["titan-405b-4d-cp2"]) == "compiled-2024"


def test_asynchronous_tensor_parallelism_changes_the_software_of_a_run():
    era = software("torch-eager")
    assert configuration(RECORDS["titan-8b-8-eager"]).used(era) == era
    hidden = configuration(RECORDS["titan-405b-interleaved"]).used(era).tensor_parallel_overlap
    assert hidden == era.async_tensor_parallel_overlap > era.tensor_parallel_overlap


def test_what_a_record_says_of_its_software_wins():
    record = RECORDS["sc21-t1-1.7B"]
    assert software_era(record.model_copy(update={"era": "te-2024"})) == "te-2024"
    silent = record.model_copy(update={"notes": ""})
    assert software_era(silent.model_copy(update={"software": "Megatron-LM 0.14"})) == "te-2024"
    with pytest.raises(RecordError, match=r"era 'te-2025' is unknown.*did you mean 'te-202[46]'"):
        software_era(record.model_copy(update={"era": "te-2025"}))


def test_every_era_of_the_cost_model_has_habits():
    for era in software_eras():
        assert 0 <= habits(era).gpt_dropout < 1
