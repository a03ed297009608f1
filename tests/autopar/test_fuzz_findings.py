"""What random programs have found, each as small as it gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import autopar
from autopar.data_parallel import data_parallel
from autopar.errors import RewriteError
from autopar.expert_parallel import expert_parallel
from autopar.localize import Localized, localize
from autopar.op_kinds import without_order
from autopar.rewrite.local import chosen
from autopar.rewrite.precision import precision_of
from autopar.rewrite.stages import cut
from autopar.search.context import is_attention
from autopar.strategies import strategies
from costmodel import optimizer_policy
from graphs.ir import OpGraph
from tests.autopar.case_runner import original
from tests.autopar.programs_on_ranks import prepare, run, trial


def graph_of(model: str) -> OpGraph:
    return original(model, torch.float64).capture.at(4)


def test_rows_of_causal_attention_are_split_in_runs() -> None:
    """A rank must know at which position its queries begin, also where the heads of others are as many as
    there are positions and cut in two."""
    graph = graph_of("llama")
    attention = next(op for op in graph.ops if is_attention(op))
    offered = strategies(without_order(attention), graph, 2, {16: ((8, 8),)})
    rows = [strategy.key for strategy in offered if strategy.key.startswith("s")]
    assert rows == ["s"]


def test_classes_that_one_axis_splits_no_other_does() -> None:
    """Of a contrastive loss the classes are the samples, which a data axis has split."""
    local = Localized.of(graph_of("clip"))
    graph = localize(local, data_parallel(local.graph, 2)).graph
    losses = [op for op in graph.ops if op.target == "autopar.cross_entropy"]
    split = next(op for op in losses if "class_axis" in op.kwargs)
    factors = {strategy.factor for strategy in strategies(without_order(split), graph, 2, {})}
    assert "c" not in factors
    assert "d0" in factors


def test_a_stage_sends_no_views_of_parameters() -> None:
    """Under ZeRO-3 the memory behind them is freed when the stage has run."""
    graph = graph_of("falcon")
    parameters = graph.parameter_tensors
    view = next(
        op
        for op in graph.ops
        if op.inputs and parameters.keys() >= set(op.inputs) and "transpose" in op.target
    )
    after = graph.ops[graph.ops.index(view) + 1]
    assert graph.loss is not None
    first, second = cut(graph, [graph.ops[0].name, after.name], (graph.loss,))
    assert view.output not in first.sends
    assert view in second.ops
    assert view not in first.ops


@pytest.mark.slow
@pytest.mark.distributed
def test_parity_notices_what_is_not_a_number(tmp_path: Path) -> None:
    directory = prepare(trial("mlp", dp_replicate=2), tmp_path)
    source = (directory / "train.py").read_text()
    reduced = "rank.gradients.reduce()"
    assert reduced in source
    spoilt = f"{reduced}\n    [*rank.parameters().values()][-1].grad.view(-1)[0] = float('nan')"
    (directory / "train.py").write_text(source.replace(reduced, spoilt))
    assert run([directory], 2) == {str(directory): "NOT EQUAL"}


def test_a_value_gathered_before_a_block_is_held_in_it() -> None:
    """The gathered form is read in the block, its shard before it."""
    plan = autopar.evaluate(
        original("opt", torch.float64).capture, "local-cpu*4", global_batch=8, dp=2, tp=2, zero_stage=3
    )
    assert plan.prediction.peak_memory_bytes > 0


def test_fp16_needs_master_copies() -> None:
    with pytest.raises(RewriteError, match="adamw-bf16, which keeps no master copies"):
        precision_of(optimizer_policy("adamw-bf16"), torch.float16)


def test_experts_whose_matrices_a_tensor_axis_gathers_are_not_dealt_out() -> None:
    """Each tensor rank stores those of some experts: other ones than it would have to pass on."""
    graph = original("mixtral", torch.float32).capture.at(4)
    parameters = graph.parameter_tensors
    keys = {
        op.name: "d0" if "transpose" in op.target and op.inputs[0] in parameters else "replicate"
        for op in graph.ops
    }
    local = localize(Localized.of(graph), chosen(graph, "tp", 2, keys))
    with pytest.raises(RewriteError, match="all 4 experts along its first dimension"):
        expert_parallel(local, 2)
