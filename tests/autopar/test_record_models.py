"""From a published record to its model."""

from __future__ import annotations

import pytest
import torch

import graphs
from autopar.records.models import (
    layer_period,
    model_key,
    model_of,
    model_type,
    num_special_layers,
)
from autopar.records.schema import Record, RecordError
from autopar.records.software import habits
from tests.autopar.record_cases import RECORDS, changed, of_group


def num_parameters(record: Record, num_layers: int | None = None) -> int:
    """Parameters at full depth, from two shallow models: each period of layers adds the same."""
    facts = record.model
    first, period = num_special_layers(facts), layer_period(facts)

    def count(depth: int) -> int:
        module = model_of(record, num_layers=depth).build_without_memory()
        return sum(parameter.numel() for parameter in module.parameters())

    one, two = count(first + period), count(first + 2 * period)
    return one + (two - one) * ((num_layers or facts.layers) - first - period) // period


@pytest.mark.parametrize(
    ("id", "num_layers", "published"),
    [
        # Model cards and papers of the models; DeepSeek-V2's run was cut to 4 layers of 60.
        ("titan-8b-8-eager", None, 8_030_261_248),
        ("titan-405b-interleaved", None, 405.9e9),
        ("mbridge-llama3-70b-gb300-64-fp8-b256m2s8192f1t1p1c1v1e1", None, 70.55e9),
        ("simumax-deepseekv2_tp1_ep8_pp1_dp8_l4_mbc4_cef", 60, 235.7e9),
        ("mbridge-gptoss120b-gb300-64-mxfp8-b1280m4s4096f0t1p1c1v1e16", None, 116.8e9),
        ("mbridge-qwen3-30b-a3b-h100-16-fp8-b1024m1s4096f0t1p2c1v12e8", None, 30.5e9),
        ("maxtext-tier-v5p-mixtral-8x7b", None, 46.7e9),
        ("nemo2407-Nemotron-340B-128", None, 341e9),
        ("colossal-h200-7b", None, 6_738_415_616),
        ("maxtext-v5p-128b-2x256", None, 125.1e9),
    ],
)
def test_parameter_counts_are_the_published_ones(id: str, num_layers: int | None, published: float):
    assert num_parameters(RECORDS[id], num_layers) == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize(
    "record", [r for r in RECORDS.values() if r.model.n_params], ids=lambda record: record.id
)
def test_parameter_counts_match_the_record(record: Record):
    assert num_parameters(record) == record.model.n_params


@pytest.mark.parametrize(
    "record", [r for r in RECORDS.values() if model_type(r.model) == "gpt2"], ids=lambda record: record.id
)
def test_gpt_has_the_parameters_of_megatrons_formula(record: Record):
    """12 l h² (1 + 13/(12 h) + (V + s)/(12 l h)), arXiv:2104.04473 section 5.1, and the last norm's 2 h."""
    m = record.model
    assert m.ffn_hidden == 4 * m.hidden
    formula = m.layers * (12 * m.hidden**2 + 13 * m.hidden) + (m.vocab + m.seq) * m.hidden
    assert num_parameters(record) == formula + 2 * m.hidden


def test_architectures_are_chosen_by_structure():
    assert {model_type(record.model) for record in RECORDS.values()} == {
        "bloom", "deepseek_v2", "gpt2", "gpt_oss", "llama", "mixtral", "nemotron", "qwen3_moe",
    }  # fmt: skip


def test_depth_keeps_leading_dense_layers_and_windows():
    window = of_group("megatron-bridge-gptoss120b")
    dense = of_group("simumax-b200-dsv2")
    plain = of_group("internevo")
    assert [layer_period(one.model) for one in (window, dense, plain)] == [2, 1, 1]
    assert [num_special_layers(one.model) for one in (window, dense, plain)] == [0, 1, 0]
    kinds = model_of(window, num_layers=4).config.layer_types
    assert kinds == ["sliding_attention", "full_attention"] * 2
    assert model_of(dense, num_layers=2).config.first_k_dense_replace == 1


def test_windowed_layers_are_captured_with_fused_attention():
    record = changed(of_group("megatron-bridge-gptoss120b"), model={"seq": 256})
    spec = model_of(record, num_layers=2)
    graph = graphs.capture(spec.build_without_memory(), spec.inputs).graph
    first, second = (op for op in graph.ops if op.target == "aten.scaled_dot_product_attention.default")
    assert first.args[3] is not None, "the window is a mask"
    assert second.args[3:6] == (None, 0.0, True), "the full layer is plainly causal"


def test_keys_tell_models_apart():
    record = RECORDS["titan-8b-8-eager"]
    same = RECORDS["titan-8b-8-compile-fp8"]
    assert model_key(record) == model_key(same)
    assert len({model_key(record), model_key(same)}) == 1
    for fields in ({"layers": 31}, {"seq": 4096}, {"dropout": 0.1}):
        assert model_key(changed(record, model=fields)) != model_key(record)
    assert model_key(record.model_copy(update={"precision": "fp16"})).dtype == torch.float16
    renamed = changed(record, model={"family": "other", "n_params": 7})
    assert model_key(renamed) == model_key(record)


def test_dropout_by_era_and_by_word():
    megatron, mpt = of_group("megatron-sc21-table1"), of_group("llm-foundry-h100")
    assert model_type(mpt.model) == model_type(megatron.model)
    assert model_key(megatron).dropout == habits("unfused-2020").gpt_dropout > 0
    assert model_key(mpt).dropout == 0
    assert model_key(megatron.model_copy(update={"notes": "Trained with no dropout."})).dropout == 0
    assert model_key(changed(megatron, model={"dropout": 0.2})).dropout == 0.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_heads": 5}, "24 heads cannot share 5 kv_heads evenly"),
        ({"hidden": 2300}, "hidden 2300 is no multiple of 24 heads; give model.head_dim"),
        ({"alibi": True, "ffn_hidden": 4096}, r"ffn_hidden 4096 must be 4 \* hidden = 9216"),
        ({"experts": 8}, "8 experts without model.topk"),
    ],
)
def test_impossible_sizes_are_refused(fields: dict[str, int], message: str):
    with pytest.raises(RecordError, match=message):
        model_of(changed(RECORDS["sc21-t1-1.7B"], model=fields))
