"""What is kept for the backward, against the formulas of arXiv:2205.05198 and against brute force."""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import graphs
from autopar.kernels import KernelMaker
from autopar.localize import Localized, localize
from autopar.plan import Parallelism, Recompute
from autopar.pricing import Pricer
from autopar.request import training_policy
from autopar.search.axis_prices import ClusterPrices
from autopar.search.axis_problem import AxisProblem
from autopar.search.block_ilp import BlockIlp
from autopar.search.bounds import Bounds
from autopar.search.cut import cheapest_cut
from autopar.search.needs import needs_of
from autopar.search.pinned import RegionRule
from autopar.search.programs import Programs
from autopar.search.saved import Saved
from autopar.search.units import Unit, build_chain
from costmodel import Group, software
from graphs import Capture
from hardware_db import cluster

S, B, H, A = 1024, 4, 1024, 16
"""Sequence, microbatch, hidden size and heads, in the paper's letters."""


def tokens(batch: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(batch, S, dtype=torch.long) for name in ("input_ids", "labels")}


@cache
def gpt() -> Capture:
    """A GPT as in the paper: GELU by its tanh form, dropout 0.1 everywhere."""
    config = GPT2Config(
        n_embd=H, n_layer=3, n_head=A, vocab_size=51200, n_positions=S, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = GPT2LMHeadModel(config).bfloat16()
    return graphs.capture(model.train(), tokens, name="gpt")


@cache
def llama() -> Capture:
    config = LlamaConfig(
        hidden_size=H, intermediate_size=int(3.5 * H), num_hidden_layers=3, num_attention_heads=A,
        num_key_value_heads=A // 8, vocab_size=32000, max_position_embeddings=S, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    return graphs.capture(model.train(), tokens, name="llama")


def block(capture: Capture, era: str, tp: int = 1, *, sequence_parallel: bool = False) -> Unit:
    """The second block of a model on one rank."""
    programs = Programs(capture, cluster("dgx-a100"), shorten=False)
    p = Parallelism(tp=tp, microbatch_size=B, sequence_parallel=sequence_parallel)
    replica = programs.replica(B, 1)
    local = replica.local
    if tp > 1:
        solution = programs.given(p).solution
        assert solution is not None
        local = localize(local, solution.assignment)
    chain = build_chain(replica.whole, local, KernelMaker(software(era), {"tp": tp}))
    return [unit for unit in chain.units if unit.is_block][1]


def kept(unit: Unit, mode: Recompute = "none") -> float:
    """Bytes of a block, in units of s·b·h."""
    return unit.saved[mode].num_bytes / (S * B * H)


def test_a_gpt_layer_keeps_34_and_5as_over_h() -> None:
    """Equation 1: s·b·h·(34 + 5·a·s/h)."""
    assert kept(block(gpt(), "unfused-2020")) == pytest.approx(34 + 5 * A * S / H, rel=0.01)


@pytest.mark.parametrize("t", [2, 4, 8])
def test_tensor_parallelism_leaves_10_whole(t: int) -> None:
    """Equation 2: s·b·h·(10 + 24/t + 5·a·s/(h·t))."""
    expected = 10 + 24 / t + 5 * A * S / (H * t)
    assert kept(block(gpt(), "unfused-2020", t)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("t", [2, 4, 8])
def test_sequence_parallelism_divides_all(t: int) -> None:
    """Equation 4: s·b·h/t·(34 + 5·a·s/h)."""
    expected = (34 + 5 * A * S / H) / t
    assert kept(block(gpt(), "unfused-2020", t, sequence_parallel=True)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("t", "sequence_parallel", "expected"), [(1, False, 34), (8, False, 10 + 24 / 8), (8, True, 34 / 8)]
)
def test_recomputing_attention_leaves_34(t: int, sequence_parallel: bool, expected: float) -> None:
    """Table 2, selective activation recomputation."""
    unit = block(gpt(), "unfused-2020", t, sequence_parallel=sequence_parallel)
    assert kept(unit, "attention") == pytest.approx(expected, rel=0.01)
    assert sum(unit.again["attention"]) == 1


@pytest.mark.parametrize("t", [1, 8])
def test_recomputing_all_leaves_2(t: int) -> None:
    """Table 2, full activation recomputation: the block's input, whole on every rank."""
    assert kept(block(gpt(), "unfused-2020", t), "full") == pytest.approx(2, rel=0.01)


def test_flash_attention_keeps_output_and_log_sum_exp() -> None:
    """No probabilities: as with selective recomputation, at no cost (arXiv:2205.14135)."""
    unit = block(gpt(), "flash-2023")
    log_sum_exp = 4 * A / H
    assert kept(unit) == pytest.approx(34 + log_sum_exp, rel=0.01)
    assert kept(unit, "attention") == kept(unit)


def test_a_llama_layer_keeps_what_fused_kernels_need() -> None:
    """Norms: input and output, 8. Queries, keys and values after rotation, 2 + 2 · 2/8. Attention's output,
    2. Gate, up and their product, 3 · 2 · 3.5."""
    expected = 8 + 2 + 2 * 2 / 8 + 2 + 21
    fused = kept(block(llama(), "te-2024"))
    assert fused == pytest.approx(expected, rel=0.01)


def test_modes_keep_less_and_less() -> None:
    unit = block(llama(), "compiled-2024")
    sizes = [kept(unit, mode) for mode in ("none", "selective", "alternate", "full")]
    assert sizes == sorted(sizes, reverse=True)
    # The products counted from the first: q, v, gate and down are kept, not k, o and up.
    assert sizes[2] == pytest.approx(2 + (2 + 2 / 8 + 7 + 2) + 2, rel=0.01)
    cosine_and_sine = 2 * 2 / A / B
    assert sizes[3] == pytest.approx(2 + cosine_and_sine)


@pytest.mark.parametrize("seed", range(200))
def test_the_cut_is_the_cheapest(seed: int) -> None:
    rng = random.Random(seed)
    names = [f"v{index}" for index in range(rng.randint(2, 9))]
    num_given = rng.randint(1, 3)
    made_from = {
        name: rng.sample(names[:index], rng.randint(0, min(3, index)))
        for index, name in enumerate(names)
        if index >= num_given
    }
    costs = {name: rng.choice([1, 2, 2, 4, 8]) for name in names}
    wanted = rng.sample(names, rng.randint(1, len(names)))

    def is_enough(found: frozenset[str]) -> bool:
        known = set(found)
        for name in names:
            if name in made_from and all(source in known for source in made_from[name]):
                known.add(name)
        return all(name in known for name in wanted)

    best = min(
        sum(costs[name] for name in chosen)
        for size in range(len(names) + 1)
        for chosen in combinations(names, size)
        if is_enough(frozenset(chosen))
    )
    found = cheapest_cut(costs, made_from, wanted)
    assert is_enough(found)
    assert sum(costs[name] for name in found) == best


@pytest.mark.parametrize(
    ("era", "precision"),
    [
        ("torch-eager", None),
        ("unfused-2020", None),
        ("fused-2022", None),
        ("te-2026", None),
        ("te-2026", "fp8"),
    ],
)
def test_strategies_are_priced_by_what_backwards_then_read(era: str, precision: str | None) -> None:
    graph = gpt().at(B)
    blocks = tuple(block.path for block in graph.blocks)
    groups = {"tp": Group(4, 1)}
    pricer = Pricer(cluster("dgx-a100"), groups, software(era), low_precision=precision, blocks=blocks)
    prices = ClusterPrices(pricer, "tp", frozenset(graph.parameter_tensors))
    rule = RegionRule(graph, sequence_parallel=False)  # nothing is gathered, of which less would be kept
    problem = AxisProblem(graph, "tp", 4, prices, custom=rule)
    assignment = BlockIlp(problem).solve().assignment
    chosen = dict(zip(graph.representative, assignment.choice, strict=True))
    priced = sum(
        problem.saved_bytes[like][problem.offered[like].index(strategy)] for like, strategy in chosen.items()
    )
    local = localize(Localized.of(graph), assignment).graph
    needs = [needs_of(local, pricer.kernels).need(op) for op in local.ops]
    read = {storage for need in needs for storage in need.storages}
    internal_bytes = sum(need.internal_bytes for need in needs)
    assert priced == sum(local.tensors[storage].num_bytes for storage in read) + internal_bytes


@pytest.mark.parametrize("precision", [None, "fp8"])
def test_no_program_of_one_device_keeps_less_than_is_known_to_be_kept(precision: str | None) -> None:
    era = software("te-2026")
    machine, policy = cluster("dgx-h100"), training_policy(llama().graph)
    bounds = Bounds(llama(), machine, policy, era, precision)
    programs = Programs(llama(), machine, era, low_precision=precision)
    for mode in ("none", "selective", "full"):
        kept = sum(unit.saved[mode].num_bytes for unit in programs.device(B).chain.units)
        assert 0 < bounds.saved_bytes[mode] <= kept / B


def test_what_is_divided_is_made_once() -> None:
    saved = Saved({"hidden": 10, "probabilities": 7}, 5, 30, "forward")
    assert saved.divided(2) == Saved({"hidden": 5, "probabilities": 3}, 2, 15, "forward")
    assert saved.divided(2) is saved.divided(2)
