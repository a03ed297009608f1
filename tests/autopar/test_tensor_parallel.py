"""Tensor parallelism as everybody knows it is found by the solver, and written nowhere."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

import autopar
from autopar.kernels import CONJUGATES
from autopar.localize import localize
from autopar.op_kinds import is_conversion, short_name
from autopar.placements import Shard
from autopar.plan import Parallelism
from autopar.search.programs import Programs
from graphs import Capture, capture
from graphs.ir import OpGraph
from hardware_db import cluster
from tests.models import GPT2, LLAMA, Case

DEGREE = 2


@cache
def captured(name: str) -> Capture:
    case = {"gpt2": GPT2, "llama": LLAMA}[name]
    return capture(case.build(), case.inputs, name=name)


def placements(case: Case) -> dict[str, str]:
    """Where the parameters of a model lie on a tensor axis of two ranks."""
    model = capture(case.build(), case.inputs, name=case.name)
    return dict(autopar.evaluate(model, "dgx-h100", global_batch=8, tp=DEGREE).placements)


def local_graph(programs: Programs, p: Parallelism) -> tuple[OpGraph, dict[str, Shard]]:
    """What a rank runs under strategies as given, and the tensors of it that are split."""
    solution = programs.given(p).solution
    assert solution is not None
    local = localize(programs.replica(p.microbatch_size, 1).local, solution.assignment)
    states = {name: axes["tp"].value for name, axes in local.states.items() if "tp" in axes}
    return local.graph, {name: value for name, value in states.items() if isinstance(value, Shard)}


def collectives(graph: OpGraph, modules: str = "") -> tuple[Counter[str], Counter[str]]:
    """Collectives of forward and backward by kind, of the ops under some module."""
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    for op in graph.ops:
        if is_conversion(op) and op.module.startswith(modules):
            there, back = CONJUGATES[short_name(op)]
            forward.update([there] if there else [])
            backward.update([back] if back and graph.tensors[op.inputs[0]].requires_grad else [])
    return forward, backward


BLOCKS = {"gpt2": "transformer.h.", "llama": "model.layers."}


@pytest.mark.parametrize(("name", "tp"), [("gpt2", 2), ("gpt2", 4), ("llama", 2)])
@pytest.mark.parametrize("microbatch_size", [1, 2])
def test_plain_tensor_parallelism_reduces_twice_a_layer(name: str, tp: int, microbatch_size: int) -> None:
    """arXiv:1909.08053, figure 4: two all_reduces of a layer's forward, two of its backward."""
    programs = Programs(captured(name), cluster("dgx-h100"), shorten=False)
    p = Parallelism(tp=tp, microbatch_size=microbatch_size, sequence_parallel=False)
    graph, split = local_graph(programs, p)
    num_layers = len(captured(name).graph.blocks)
    forward, backward = collectives(graph, BLOCKS[name])
    backward.update(collectives(graph)[1] - backward)  # the last layer's output is copied outside of it
    assert forward == {"all_reduce": 2 * num_layers}
    assert backward["all_reduce"] == 2 * num_layers + 1
    assert set(backward) == {"all_reduce"}
    norms = [op for op in graph.ops if "norm" in op.module or ".ln_" in op.module]
    assert norms
    assert not any(tensor in split for op in norms for tensor in (*op.inputs, *op.outputs))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sequence_parallelism_gathers_and_scatters(name: str) -> None:
    """arXiv:2205.05198, figure 5: an all_gather and a reduce_scatter around every pair of products."""
    programs = Programs(captured(name), cluster("dgx-h100"), shorten=False)
    graph, split = local_graph(programs, Parallelism(tp=2, sequence_parallel=True))
    num_layers = len(captured(name).graph.blocks)
    pairs = {"all_gather": 2 * num_layers, "reduce_scatter": 2 * num_layers}
    assert collectives(graph, BLOCKS[name]) == (pairs, pairs)
    norms = [op for op in graph.ops if "norm" in op.module or ".ln_" in op.module]
    made = {name for op in norms for name in op.outputs if graph.tensors[name].requires_grad}
    assert {split[name].dim for name in made & set(split)} == {1}
    whole = [name for name in made - set(split) if len(graph.tensors[name].shape) == 3]
    assert all(short_name(graph.ops[graph.producer[name]]) == "all_gather" for name in whole)


def test_given_strategies_do_not_depend_on_the_cluster() -> None:
    """Not on its links, nor on how many nodes the ranks lie."""
    found = {
        str(sorted(Programs(captured("llama"), cluster(name)).given(p).strategies["tp"].items()))
        for name in ("dgx-h100", "dgx-a100*8", "dgx-2")
        for p in (Parallelism(tp=2), Parallelism(tp=2, num_microbatches=64))
    }
    assert len(found) == 1


def test_a_search_within_a_pinned_region_stays_there() -> None:
    programs = Programs(captured("llama"), cluster("dgx-h100"), shorten=False)
    p = Parallelism(tp=2, microbatch_size=2, num_microbatches=4, sequence_parallel=False)
    solution = programs.program(p).solution
    assert solution is not None
    local = localize(programs.replica(2, 1).local, solution.assignment)
    assert "reduce_scatter" not in collectives(local.graph)[0]


def test_llama_is_split_by_columns_then_rows() -> None:
    found = placements(LLAMA)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        assert found[f"model.layers.*.{name}.weight"] == "tp S(0)"
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert found[f"model.layers.*.{name}.weight"] == "tp S(1)"


def test_fused_projections_are_split_in_each_of_their_parts() -> None:
    found = placements(GPT2)
    assert found["transformer.h.*.attn.c_attn.weight"] == "tp S(1, 3 sections)"
    assert found["transformer.h.*.attn.c_proj.weight"] == "tp S(0)"
    assert found["transformer.h.*.mlp.c_fc.weight"] == "tp S(1)"
    assert found["transformer.h.*.mlp.c_proj.weight"] == "tp S(0)"
