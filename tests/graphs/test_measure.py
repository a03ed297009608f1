"""FLOPs and saved tensors, against torch's own counter and against what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import graphs
from graphs import OpGraph
from tests.models import BERT, GPT2, LLAMA, MIXTRAL, Case, case, hugging_face, language

DENSE = [case("mlp"), case("resnet"), GPT2, LLAMA, BERT]


def saved_bytes_of_graph(graph: OpGraph) -> int:
    """Bytes that autograd keeps for a forward besides the model's inputs, parameters and buffers."""
    leaves = {name for name in graph.tensors if name not in graph.producer}
    storages = {name for op in graph.ops for name in op.saved} - leaves
    internal = sum(op.saved_internal_bytes for op in graph.ops)
    return internal + sum(graph.tensors[name].num_bytes for name in storages)


def saved_bytes_of_model(model: nn.Module, inputs) -> int:
    leaves = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers(), *inputs.values())
        if isinstance(tensor, torch.Tensor)
    }
    if hasattr(model, "config"):
        model.config.use_cache = False  # a cache would keep copies of keys and values
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(**inputs)
    assert output is not None
    return sum(size for pointer, size in storages.items() if pointer not in leaves)


def attention_flops(query, key, value, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


@pytest.mark.parametrize("item", DENSE, ids=str)
def test_flops_equal_the_counter_on_the_model(item: Case):
    model, inputs = item.build(), item.inputs(2)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: attention_flops}) as counter:
        model(**inputs)
    graph = graphs.capture(model, item.inputs).graph
    assert graph.flops == counter.get_total_flops() > 0


def test_experts_cost_their_rows_once():
    graph = graphs.capture(MIXTRAL.build(), MIXTRAL.inputs).graph
    grouped = [op for op in graph.ops if "grouped_mm" in op.target]
    rows = 2 * 16 * 2  # batch, sequence, experts per token
    up, down = 2 * rows * 64 * (2 * 128), 2 * rows * 128 * 64
    assert [op.flops for op in grouped] == [up, down] * 2


@pytest.mark.parametrize("item", DENSE[1:], ids=str)
def test_saved_bytes_equal_what_autograd_keeps(item: Case):
    model = item.build()
    assert saved_bytes_of_graph(graphs.capture(model, item.inputs).graph) == saved_bytes_of_model(
        model, item.inputs(2)
    )


def test_a_llama_layer_saves_what_the_formula_says():
    """In bf16, without dropout, in units of sequence · batch · hidden bytes."""
    small = LLAMA.build().bfloat16()
    graph = graphs.capture(small, LLAMA.inputs).graph
    block = graph.blocks[0]
    ops = graph.ops[block.start : block.stop]
    inside = {name for op in ops for name in op.outputs}
    names = {name for op in ops for name in op.saved} & inside
    width, kv, mlp = 64, 32, 128
    norm = 2 * (4 + 2) * width + 2 * 4  # per norm: input in fp32, normalised in bf16, inverse root in fp32
    attention = (
        2 * (width + kv + kv) + 2 * width + 4 * 4
    )  # q, k, v, output, and a log-sum-exp per head in fp32
    linear_inputs = 2 * 2 * width
    gated = 2 * 4 * mlp  # gate, its activation, up, and their product
    expected = 2 * 16 * (norm + attention + linear_inputs + gated)  # cosine and sine are made once, outside
    got = sum(graph.tensors[name].num_bytes for name in names) + sum(op.saved_internal_bytes for op in ops)
    assert got == expected


def test_dropout_keeps_a_mask_of_one_byte_as_on_an_accelerator():
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(self.linear(x), 0.1, self.training).sum()

    graph = graphs.capture(Dropped(), {"x": torch.randn(4, 8)}).graph
    dropout = next(op for op in graph.ops if "dropout" in op.target)
    assert dropout.saved == ()
    assert dropout.saved_internal_bytes == 2 * 8


def test_attention_with_dropout_saves_as_the_fused_kernel():
    settings = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 128, "n_positions": 64}
    dropped = hugging_face(
        "GPT2LMHeadModel", "GPT2Config", language, **settings, bos_token_id=0, eos_token_id=1
    )
    graph = graphs.capture(dropped.build(), dropped.inputs).graph
    attention = next(op for op in graph.ops if "attention" in op.target)
    assert attention.args[4] == 0.1
    assert attention.saved_internal_bytes == 4 * 2 * 4 * 16  # the log-sum-exp, no matrix of sequence squared


def test_storage_follows_views():
    graph = graphs.capture(GPT2.build(), GPT2.inputs).graph
    split = next(op for op in graph.ops if "split" in op.target)
    assert {graph.tensors[name].storage for name in split.outputs} == {split.inputs[0]}
    for tensor in graph.tensors.values():
        assert graph.tensors[tensor.storage].storage == tensor.storage
