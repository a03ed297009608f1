"""The graph computes what the model computes: the same loss, the same gradients, at any batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphs
from tests.models import ALL, BERT, GPT2, LLAMA, MIXTRAL, T5, Case, case, tokens

# The grouped matrix product of the experts has no fp64 kernel.
SINGLE_PRECISION = {"mixtral", "qwen3moe", "deepseekv3"}
EXACT = [case("mlp"), case("resnet"), GPT2, LLAMA, BERT, T5, MIXTRAL]


def prepared(item: Case):
    torch.manual_seed(0)
    model = item.build()
    dtype = torch.float32 if item.name in SINGLE_PRECISION else torch.float64

    def inputs(batch: int):
        return {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in item.inputs(batch).items()
        }

    return model.to(dtype), inputs


def loss_and_gradients_of_graph(graph: graphs.OpGraph, model: nn.Module, inputs):
    values = {
        item.tensor: model.get_parameter(item.name)
        .detach()
        .clone()
        .requires_grad_(graph.tensors[item.tensor].requires_grad)
        for item in graph.parameters
    }
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    results = graphs.run(graph, values | tensors)
    assert graph.loss is not None
    results[graph.loss].backward()
    for name, tensor in results.items():
        assert (tuple(tensor.shape), tensor.dtype) == (
            graph.tensors[name].shape,
            graph.tensors[name].dtype,
        ), name
    return results[graph.loss].detach(), {item.name: values[item.tensor].grad for item in graph.parameters}


def loss_and_gradients_of_model(model: nn.Module, inputs):
    model.zero_grad()
    output = model.train()(**inputs)
    loss = output if isinstance(output, torch.Tensor) else output["loss"]
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_training(graph: graphs.OpGraph, model: nn.Module, inputs) -> None:
    loss, gradients = loss_and_gradients_of_graph(graph, model, inputs)
    true_loss, true_gradients = loss_and_gradients_of_model(model, inputs)
    torch.testing.assert_close(loss, true_loss)
    assert gradients.keys() == true_gradients.keys()
    for name, gradient in gradients.items():
        true = true_gradients[name]
        if gradient is None or true is None:  # one side may materialise zeros that the other leaves out
            rest = true if gradient is None else gradient
            assert rest is None or not rest.any(), name
        else:
            torch.testing.assert_close(gradient, true, msg=name)


@pytest.mark.parametrize("item", EXACT, ids=str)
def test_loss_and_every_gradient_equal_the_models(item):
    model, inputs = prepared(item)
    assert_same_training(graphs.capture(model, inputs).graph, model, inputs(2))


@pytest.mark.slow
@pytest.mark.parametrize("item", [item for item in ALL if item not in EXACT], ids=str)
def test_every_family_trains_alike_at_other_batch_sizes(item):
    model, inputs = prepared(item)
    captured = graphs.capture(model, inputs)
    for batch in (1, 4):
        assert_same_training(captured.at(batch), model, inputs(batch))


def test_other_batch_sizes_keep_names_and_scale_what_depends_on_the_batch():
    captured = graphs.capture(LLAMA.build(), LLAMA.inputs)
    graph, larger = captured.graph, captured.at(8)
    assert [op.name for op in graph.ops] == [op.name for op in larger.ops]
    assert larger.flops == 4 * graph.flops
    assert larger.tensors["input_ids"].shape == (8, 16)
    assert captured.at(2) == graph
    whole = {op.name: op.saved_internal_bytes for op in graph.ops if "attention" in op.target}
    assert all(op.saved_internal_bytes == 4 * whole[op.name] for op in larger.ops if op.name in whole)


def test_an_example_mapping_is_enough():
    by_function = graphs.capture(LLAMA.build(), LLAMA.inputs)
    by_example = graphs.capture(LLAMA.build(), LLAMA.inputs(5))
    assert by_example == by_function


class ScalesWithBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * (1.0 / x.shape[0])).sum()


def test_a_constant_that_depends_on_the_batch_leaves_only_the_captured_size():
    captured = graphs.capture(ScalesWithBatch(), {"x": torch.randn(6, 4)})
    assert captured.at(2).loss is not None
    with pytest.raises(graphs.CaptureError, match=r"mul: aten\.mul"):
        captured.at(4)


def test_the_model_is_left_as_it_was():
    model = LLAMA.build().eval()
    model.model.layers[0].train()
    before = dict(model.named_parameters())
    config = dict(vars(model.config))
    modes = [module.training for module in model.modules()]
    graphs.capture(model, LLAMA.inputs)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert modes == [module.training for module in model.modules()]
    assert config == vars(model.config)
    model(input_ids=tokens(2))


def test_causal_attention_needs_no_mask_and_bidirectional_none_either():
    for item, causal in ((LLAMA, True), (GPT2, True), (BERT, False)):
        ops = [op for op in graphs.capture(item.build(), item.inputs).graph.ops if "attention" in op.target]
        assert len(ops) == 2
        for op in ops:
            mask, _, is_causal = (
                (*op.args[3:6], None, 0.0, False)[:3] if len(op.args) > 3 else (None, 0.0, False)
            )
            assert mask is None
            assert is_causal is causal


def test_a_mask_that_is_given_is_kept():
    model, inputs = prepared(LLAMA)

    def padded(batch: int):
        mask = torch.ones(batch, 16, dtype=torch.int64)
        mask[0, :3] = 0
        return {**inputs(batch), "attention_mask": mask}

    captured = graphs.capture(model, padded)
    assert "attention_mask" in captured.graph.inputs
    assert_same_training(captured.graph, model, padded(2))


def test_inputs_outputs_and_ties_go_by_their_names():
    graph = graphs.capture(GPT2.build(), GPT2.inputs).graph
    assert graph.inputs == ("input_ids", "labels")
    assert graph.output_names == ("loss", "logits")
    tied = next(item for item in graph.parameters if item.name == "transformer.wte.weight")
    assert tied.aliases == ("lm_head.weight",)
    assert graph.num_parameters == sum(parameter.numel() for parameter in GPT2.build().parameters())
    assert graph.modules["transformer.h.0.attn"].type_name == "GPT2Attention"


def test_parameters_that_forward_does_not_read_are_listed():
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x).sum()

    graph = graphs.capture(Lazy(), {"x": torch.randn(3, 4)}).graph
    assert [item.name for item in graph.parameters] == [
        "used.weight",
        "used.bias",
        "unused.weight",
        "unused.bias",
    ]


def test_frozen_parameters_have_no_gradient():
    model = case("mlp").build()
    model.layers[0].requires_grad_(False)
    graph = graphs.capture(model, case("mlp").inputs).graph
    assert not graph.tensors["layers.0.weight"].requires_grad
    assert not graph.tensors["linear"].requires_grad
    assert graph.tensors["linear_1"].requires_grad


def test_a_model_without_memory_gives_the_same_graph():
    ordinary = graphs.capture(LLAMA.build(), LLAMA.inputs)
    meta = graphs.build_without_memory(LLAMA.build)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert not any(buffer.is_meta for buffer in meta.buffers())
    captured = graphs.capture(meta, LLAMA.inputs)
    assert captured == ordinary
    for buffer, true in zip(captured.graph.buffers, ordinary.graph.buffers, strict=True):
        assert buffer.value is not None
        torch.testing.assert_close(buffer.value, true.value)


def test_building_without_memory_keeps_ties():
    model = graphs.build_without_memory(GPT2.build)
    assert model.lm_head.weight is model.transformer.wte.weight


class Drawn(nn.Module):
    """A weight and a buffer, each drawn by `normal_`; the weight has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.weight = self.linear.weight
        assert nn.init.normal_(self.weight) is self.weight
        self.register_buffer("noise", torch.empty(4).normal_(3, 0.1))


class NormalDraws(TorchDispatchMode):
    """Notes the devices for which torch draws."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.normal_.default:
            self.devices.append(args[0].device.type)
        return func(*args, **(kwargs or {}))


def test_building_without_memory_draws_for_buffers_alone():
    with NormalDraws() as draws:
        torch.manual_seed(0)
        model = graphs.build_without_memory(Drawn)
        assert draws.devices == ["cpu"]
        Drawn()
        assert draws.devices == ["cpu"] * 3
    assert model.weight is model.linear.weight
    assert model.weight.is_meta
    torch.testing.assert_close(model.get_buffer("noise").mean(), torch.tensor(3.0), rtol=0.1, atol=0)


def test_torch_draws_again_once_a_model_could_not_be_built():
    def factory() -> nn.Module:
        assert torch.Tensor.normal_ is not normal
        raise RuntimeError("no such model")

    normal, register = torch.Tensor.normal_, nn.Module.register_parameter
    with pytest.raises(RuntimeError, match="no such model"):
        graphs.build_without_memory(factory)
    assert torch.Tensor.normal_ is normal
    assert nn.Module.register_parameter is register
    assert torch.zeros(64).normal_().any()
