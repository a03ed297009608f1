"""A context axis: whatever its strategies, and in whatever order positions are dealt out, all ranks together
do what the whole graph does."""

from __future__ import annotations

import pytest
import torch

import graphs
from autopar.localize import CAUSAL_ROWS, Localized, localize
from autopar.placements import Shard, sharded
from autopar.rewrite.local import context_split
from autopar.search.replicas import context_parallel, strategy_keys
from tests.autopar.double_captures import captured
from tests.autopar.random_plans import random_context
from tests.autopar.simulated_ranks import deal, run, whole_of


def differences(name: str, size: int, keys: dict[str, str] | None) -> Localized:
    """Hold loss and gradients of a context axis of `size` ranks against those of the whole model; the
    customary strategies without `keys`."""
    capture, weights, batch = captured(name)
    graph = capture.at(4)
    keys = keys or strategy_keys(graph, context_parallel(graph, size))
    leaves = {key: weights[key].detach().requires_grad_() for key in graph.parameter_tensors}
    loss = graphs.run(graph, {**weights, **batch, **leaves})[graph.loss or ""]
    loss.backward()
    local = localize(Localized.of(graph), context_split(graph, size, keys))
    ranks = run(local, "cp", size, {**weights, **batch})
    losses = ranks[graph.loss or ""]
    torch.testing.assert_close(whole_of(losses, local.states[graph.loss or ""]["cp"].value), loss)
    torch.autograd.backward(losses, [torch.ones_like(each) for each in losses])
    for key, leaf in leaves.items():
        if leaf.grad is not None and graph.tensors[key].requires_grad:
            parts = [torch.zeros_like(part) if part.grad is None else part.grad for part in ranks[key]]
            made = whole_of(parts, local.states[key]["cp"].grad)
            torch.testing.assert_close(made, leaf.grad, msg=f"the gradient of {key}")
    return local


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "gemma2", "whisper"])
def test_the_customary_split_gives_loss_and_gradients_of_the_whole(name: str, size: int) -> None:
    local = differences(name, size, None)
    causal = [op for op in local.graph.ops if op.target == CAUSAL_ROWS]
    assert all(op.kwargs["zigzag"] for op in causal)
    assert bool(causal) == (name in {"gpt2", "llama", "whisper"})
    logits = max(local.graph.ops, key=lambda op: local.graph.tensors[op.outputs[0]].shape[-1:])
    assert isinstance(local.states[logits.outputs[0]]["cp"].value, Shard), "the largest tensors stay split"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_random_strategies_give_loss_and_gradients_of_the_whole(name: str, seed: int) -> None:
    graph = captured(name)[0].at(4)
    differences(name, 2, random_context(graph, 2, seed))


def test_in_zigzag_every_rank_has_an_early_and_a_late_slice() -> None:
    parts = deal(torch.arange(12), Shard(0, zigzag=True), 3)
    assert [part.tolist() for part in parts] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert torch.equal(whole_of(parts, Shard(0, zigzag=True)), torch.arange(12))
    under_causal_mask = [sum(position + 1 for position in part.tolist()) for part in parts]
    assert len(set(under_causal_mask)) == 1


def test_in_zigzag_each_section_is_dealt_out_by_itself() -> None:
    parts = deal(torch.arange(8), Shard(0, (4, 4), zigzag=True), 2)
    assert [part.tolist() for part in parts] == [[0, 3, 4, 7], [1, 2, 5, 6]]


def test_a_length_that_does_not_divide_into_two_slices_a_rank_stays_in_order() -> None:
    graph = captured("llama")[0].at(4)
    size = 16  # of 16 positions
    split = context_split(graph, size, strategy_keys(graph, context_parallel(graph, size)))
    states = {state for choice in split.choice for state in (*choice.operands, *choice.results)}
    assert sharded(1) in states
    assert not any(isinstance(state.value, Shard) and state.value.zigzag for state in states)
