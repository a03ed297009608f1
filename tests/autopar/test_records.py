"""From a published record to what autopar evaluates: models, clusters and configurations of real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graphs
from autopar.records.clusters import cluster_of
from autopar.records.configuration import configuration
from autopar.records.models import (
    layer_period,
    model_key,
    model_of,
    model_type,
    num_special_layers,
)
from autopar.records.schema import Record, RecordError, read_records
from autopar.records.software import habits, software_era
from costmodel import software, software_eras
from hardware_db import UnknownHardwareError

EXCERPT = Path(__file__).parent / "data" / "records.json"
RECORDS = {record.id: record for record in read_records(EXCERPT)}
every_record = pytest.mark.parametrize("record", RECORDS.values(), ids=lambda record: record.id)


def of_group(group: str) -> Record:
    """The first record of a group."""
    return next(record for record in RECORDS.values() if record.group == group)


def changed(record: Record, **parts: dict[str, Any]) -> Record:
    """A record with other fields in its model, cluster, parallelism or batch."""
    return record.model_copy(
        update={name: getattr(record, name).model_copy(update=fields) for name, fields in parts.items()}
    )


def written(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def entry(**changes: Any) -> dict[str, Any]:
    """The first record of the excerpt as the file has it, with changes to its top fields."""
    return json.loads(EXCERPT.read_text(encoding="utf-8"))["records"][0] | changes


# The format


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


# Models


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


# Clusters


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


# Configurations


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


# Eras


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
