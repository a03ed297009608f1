"""Models by name, by configuration and by function."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import graphs
from autopar.model_scaling import small
from autopar.models import ModelError, load, published_model, published_models

REQUIRED = {
    "gpt3-175b",
    "llama2-7b",
    "llama3-8b",
    "llama3-70b",
    "llama3.1-405b",
    "mixtral-8x7b",
    "mixtral-8x22b",
    "bert-large",
    "gpt2",
}


def test_the_published_models_are_there_with_their_sources():
    assert set(published_models()) >= REQUIRED
    for name in published_models():
        entry = published_model(name)
        assert entry["name"] == name
        assert entry["source"]


@pytest.mark.parametrize("name", published_models())
def test_a_published_model_has_the_parameters_it_is_known_for(name):
    model = load(name).build_without_memory()
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == published_model(name)["num_parameters"]
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_largest_is_captured_in_seconds_and_without_memory():
    spec = load("llama3.1-405b", seq_len=2048)
    captured = graphs.capture(spec.build_without_memory(), spec.inputs, name=spec.name)
    assert captured.graph.num_parameters == 405_853_388_800
    assert len(captured.graph.blocks) == 126
    assert {block.block_class for block in captured.graph.blocks} == {0}
    # Forward FLOPs per token: two per weight of a product, and attention over the sequence.
    embedding = 128_256 * 16_384
    attention = 126 * 2 * 2 * 2048 * 16_384
    products = 2 * (405_853_388_800 - embedding - 253 * 16_384)
    assert captured.at(1).flops == 2048 * (products + attention)


def test_sequence_length_and_dtype():
    assert load("gpt2").seq_len == 1024
    assert load("llama3.1-405b").seq_len == 4096
    spec = load("gpt2", seq_len=32, dtype=torch.float64)
    inputs = spec.inputs(3)
    assert inputs["input_ids"].shape == inputs["labels"].shape == (3, 32)
    assert inputs["input_ids"] is not inputs["labels"]
    assert torch.equal(inputs["input_ids"], spec.inputs(3)["input_ids"])
    assert next(spec.build_without_memory().parameters()).dtype is torch.float64


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ModelError, match="did you mean 'llama3-8b'"):
        load("lama3-8b")


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 48,
}


def test_a_configuration_by_file_or_directory(tmp_path):
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    by_folder, by_file = load(str(folder)), load(str(folder / "config.json"))
    assert by_folder.name == by_file.name == "tiny-llama"
    assert by_folder.seq_len == 48
    assert type(by_folder.build()).__name__ == "LlamaForCausalLM"


def test_a_configuration_without_architectures_is_a_language_model(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**CONFIG, "architectures": None}))
    assert type(load(str(file)).build_without_memory()).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "not JSON"), ("{}", "no field model_type"), ('{"model_type": "lamma"}', "no model_type 'lamma'")],
)
def test_configurations_that_are_none(tmp_path, text, problem):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ModelError, match=problem):
        load(str(file))


def test_a_directory_without_a_configuration(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(str(tmp_path))


CODE = """
import torch
from torch import nn

class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, x, y):
        return nn.functional.mse_loss(self.linear(x), y)

def with_example():
    return Regression(), {"x": torch.randn(4, 8), "y": torch.randn(4, 1)}

def with_function():
    return Regression(), lambda batch: {"x": torch.randn(batch, 8), "y": torch.randn(batch, 1)}

def without_inputs():
    return Regression()

def no_module():
    return 3
"""


@pytest.mark.parametrize("function", ["with_example", "with_function"])
def test_a_function_in_a_file(tmp_path, function):
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    spec = load(f"{file}:{function}")
    assert spec.name == function
    for batch in (1, 4, 9):
        inputs = spec.inputs(batch)
        assert inputs["x"].shape == (batch, 8)
        assert spec.build()(**inputs).shape == ()
    captured = graphs.capture(spec.build_without_memory(), spec.inputs)
    assert captured.graph.inputs == ("x", "y")
    assert small(spec) is spec


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("without_inputs", "return \\(module, inputs\\)"),
        ("no_module", "must return a module"),
        ("with_exampel", "did you mean 'with_example'"),
    ],
)
def test_functions_that_do_not_serve(tmp_path, function, problem):
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    with pytest.raises(ModelError, match=problem):
        load(f"{file}:{function}")
    with pytest.raises(ModelError, match="no file"):
        load(f"{tmp_path / 'absent.py'}:{function}")


@pytest.mark.parametrize(
    "name", ["gpt2", "llama3-8b", "mixtral-8x7b", "bert-large", "deepseek-v3", "qwen2.5-7b"]
)
def test_a_small_sibling_keeps_the_architecture_and_trains(name):
    full, sibling = load(name), small(load(name), num_layers=2, seq_len=16)
    model: nn.Module = sibling.build()
    assert type(model) is type(full.build_without_memory())
    assert sum(parameter.numel() for parameter in model.parameters()) < 20e6
    assert sibling.seq_len == 16
    heads, kv_heads = sibling.config.num_attention_heads, getattr(sibling.config, "num_key_value_heads", 4)
    assert heads % 4 == 0
    assert kv_heads % 4 == 0
    loss = model(**sibling.inputs(2)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert sibling.config.vocab_size == 512
    assert full.config.vocab_size != 512
