"""From a published record to its parallelism and settings, in the words of autopar."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.records.configuration import configuration
from autopar.records.schema import Record, RecordError
from tests.autopar.record_cases import RECORDS, changed, every_record, of_group


@every_record
def test_candidates_agree_with_the_record(record: Record):
    how = configuration(record)
    candidates = list(how.candidates())
    assert candidates
    assert len(candidates) == len(set(map(str, candidates)))
    assert how.is_complete == (len(candidates) == 1)
    for one in candidates:
        assert one.world_size == record.cluster.n_devices
        assert (one.tp, one.pp, one.cp) == (
            record.parallelism.tp,
            record.parallelism.pp,
            record.parallelism.cp,
        )
        if record.batch.global_batch is not None:
            assert one.global_batch == record.batch.global_batch
        if record.batch.micro_batch is not None:
            assert one.microbatch_size == record.batch.micro_batch


@pytest.mark.parametrize(
    ("id", "expected"),
    [
        ("vtrain-multi-3.6B-t2d32p1m2-6", "dp32 tp2 no-sp mb2x8 full-recompute"),
        ("internevo-t1z8-128", "dp16x8 zero1 mb2x4"),
        ("llm-foundry-h100-3b-s2048-n128-mb8", "dp128 zero2 mb8x1"),
        ("nemo2407-GPT3-175B-128", "dp4 tp4 sp pp8x6 Interleaved1F1B zero1 mb1x64"),
        ("maxtext-v5p-128b-2x256", "dp2x16 tp8 no-sp zero3 mb8x1 selective-recompute"),
        ("bloom-prequel-L583", "dp4 tp8 no-sp pp10 1F1B zero1 mb1x512 full-recompute"),
        ("titan-405b-4d-cp2", "dp4 cp2 tp8 sp pp8 1F1B zero1 mb1x8 full-recompute"),
        (
            "mbridge-gptoss120b-gb300-64-mxfp8-b1280m4s4096f0t1p1c1v1e16",
            "dp64 ep16 zero1 mb4x5",
        ),
    ],
)
def test_configurations_in_autopars_words(id: str, expected: str):
    assert str(next(configuration(RECORDS[id]).candidates())) == expected


def test_what_a_source_leaves_open_is_enumerated():
    small = configuration(RECORDS["sc21-t1-1.7B"])
    assert small.microbatch_sizes == (1, 2, 4, 8, 16)
    deep = configuration(RECORDS["sc21-t1-1008.0B"])
    assert deep.virtual_stages == (2,), "128 layers on 64 stages"
    assert deep.microbatch_sizes == (1, 2, 4, 8), "512 samples fill 64 stages"
    uneven = configuration(RECORDS["titan-405b-interleaved"])
    assert uneven.virtual_stages == (2, 4, 8), "126 layers and two more on 8 ranks"
    assert len(configuration(RECORDS["nemo2407-GPT3-175B-128"]).recomputes) == 3
    open_settings = configuration(RECORDS["nemolauncher-175b-8n"])
    assert open_settings.virtual_stages == (1, 2, 3, 4, 6, 12)
    assert {one.schedule for one in open_settings.candidates()} == {"1F1B", "Interleaved1F1B"}


def test_shares_of_layers():
    assert configuration(RECORDS["titan-8b-8-eager"]).recompute_share == 1
    partial = configuration(RECORDS["mbridge-llama3-8b-h100-8-fp8-b128m1s8192f1t1p1c1v1e1"])
    assert (partial.recomputes, partial.recompute_share) == (("full",), 5 / 32)
    offloaded = configuration(RECORDS["mbridge-llama3-70b-gb300-64-fp8-b256m2s8192f1t1p1c1v1e1"])
    assert offloaded.offload_share == 20 / 80
    assert configuration(of_group("trillium-llama3")).offload_share == 1


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", "bf16"), ("fp16", "fp16"), ("mxfp8", "fp8"), ("nvfp4", "fp4")]
)
def test_precisions_have_a_dtype_of_the_hardware(precision: str, dtype: str):
    record = of_group("megatron-bridge-gptoss120b").model_copy(update={"precision": precision})
    assert configuration(record).compute_dtype == dtype


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallelism": {"tp": 3}}, r"32 devices are no multiple of tp 3 \* pp 1 \* cp 1 = 3"),
        (
            {"parallelism": {"zero_stage": 1, "zero_group": 5}},
            "over 5 ranks, which do not divide 32 replicas",
        ),
        (
            {"batch": {"micro_batch": 5}},
            r"global batch of 512 is no multiple of 32 replicas \* microbatches of 5",
        ),
        ({"parallelism": {"recompute": "some"}}, "parallelism.recompute is 'some', expected none, selective"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, dict[str, Any]], message: str):
    with pytest.raises(RecordError, match=message):
        configuration(changed(RECORDS["sc21-t1-1.7B"], **fields))
