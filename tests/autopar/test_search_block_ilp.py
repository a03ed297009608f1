"""The operator layer against brute force, and what it finds in a real decoder."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import pairwise, product
from math import isclose, prod

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphs
import hardware_db
from autopar.data_parallel import data_parallel
from autopar.localize import Assignment, Localized, localize
from autopar.placements import RP, RR, Shard, State
from autopar.pricing import Pricer
from autopar.search.axis_prices import ClusterPrices
from autopar.search.axis_problem import AxisProblem
from autopar.search.block_ilp import BlockIlp, MemoryPrice
from autopar.strategies import stored_state
from costmodel import Group
from graphs.ir import OpGraph
from tests.autopar.graph_builder import GraphBuilder

CLUSTER = hardware_db.cluster("dgx-h100")
MOST_COMBINATIONS = 3_000


def pricer(size: int) -> Pricer:
    return Pricer(CLUSTER, {"tp": Group(size, 1), "dp": Group(1, size)})


def problem_of(graph: OpGraph, size: int) -> AxisProblem:
    return AxisProblem(graph, "tp", size, ClusterPrices(pricer(size), "tp"))


def price_s(problem: AxisProblem, assignment: Assignment, num_microbatches: float = 1) -> float:
    """The price of an assignment, independently of any program: localize the graph and price that."""
    local = localize(Localized.of(problem.graph), assignment).graph
    sums_s = sum(problem.reduction_s(name, assignment.sources[name]) for name in local.parameter_tensors)
    return sum(cost.total_s for cost in pricer(problem.size).graph(local)) + sums_s / num_microbatches


def random_graph(seed: int) -> OpGraph:
    """Three to six ops, with values that several ops read."""
    rng = random.Random(seed)
    builder = GraphBuilder()
    values = [builder.input(rng.choice([2, 8]), rng.choice([128, 1024]), rng.choice([256, 1024]))]
    values.append(builder.linear(values[0], builder.tensors[values[0]].shape[-1] * rng.choice([1, 2])))
    for _ in range(rng.randint(1, 4)):
        x = rng.choice(values[1:])
        kind = rng.choice(["linear", "relu", "norm", "add", "mul"])
        if kind == "linear":
            values.append(builder.linear(x, rng.choice([256, 1024])))
        elif kind in ("relu", "norm"):
            values.append(getattr(builder, kind)(x))
        else:
            alike = [y for y in values if builder.tensors[y].shape == builder.tensors[x].shape]
            values.append(getattr(builder, kind)(x, rng.choice(alike)))
    return builder.graph(builder.sum(values[-1]))


def assignments(problem: AxisProblem) -> Iterator[tuple[Assignment, float]]:
    """Every combination of strategies that conversions can join, with its time by plain summation."""
    graph = problem.graph
    offered = [problem.offered[index] for index in range(len(graph.ops))]
    for combination in product(*(range(len(strategies)) for strategies in offered)):
        choice = tuple(strategies[k] for strategies, k in zip(offered, combination, strict=True))
        needed: dict[str, dict[State, None]] = {}
        for op, strategy in zip(graph.ops, choice, strict=True):
            for name, state in zip(op.inputs, strategy.operands, strict=True):
                needed.setdefault(name, {})[state] = None
        sources = dict.fromkeys(graph.inputs, RR)
        sources |= {p.tensor: stored_state(needed[p.tensor]) for p in graph.parameters}
        assignment = Assignment("tp", problem.size, choice, sources)
        times_s = [problem.op_times_s[index][k] for index, k in enumerate(combination)]
        moves_s = [
            problem.conversion_s(name, assignment.state_of(graph, name), state)
            for name, states in needed.items()
            for state in states
        ]
        if None not in moves_s:
            sums_s = sum(problem.reduction_s(name, state) for name, state in sources.items())
            yield assignment, sum(times_s) + sum(move for move in moves_s if move) + sums_s


def penalty_s(problem: AxisProblem, assignment: Assignment, price: MemoryPrice) -> float:
    saved = sum(
        problem.saved_bytes[like][problem.offered[like].index(strategy)]
        for like, strategy in zip(problem.graph.representative, assignment.choice, strict=True)
    )
    stored = sum(
        problem.graph.tensors[p.tensor].num_bytes / problem.parts(assignment.sources[p.tensor])
        for p in problem.graph.parameters
    )
    return price.activation_s_per_byte * saved + price.parameter_s_per_byte * stored


def random_problem(seed: int) -> AxisProblem:
    """A random graph and axis with few enough combinations to try them all."""
    for attempt in range(seed, 100_000, 1_000):
        problem = problem_of(random_graph(attempt), random.Random(attempt).choice([2, 4, 8]))
        if prod(len(offered) for offered in problem.offered.values()) <= MOST_COMBINATIONS:
            return problem
    raise AssertionError("no small graph")


@pytest.mark.parametrize("seed", range(300))
def test_equals_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    problem = random_problem(seed)
    price = MemoryPrice(rng.choice([0, 1e-13, 1e-11]), rng.choice([0, 1e-13, 1e-11]))
    solution = BlockIlp(problem).solve(1, price)
    best_s = min(time_s + penalty_s(problem, found, price) for found, time_s in assignments(problem))
    assert isclose(solution.objective_s, best_s, rel_tol=1e-6)
    assert isclose(solution.bound_s, best_s, rel_tol=1e-5)
    assert isclose(price_s(problem, solution.assignment), solution.time_s, rel_tol=1e-9)


def test_a_column_then_a_row_parallel_product_share_one_reduction() -> None:
    builder = GraphBuilder(torch.bfloat16)
    hidden = builder.relu(builder.linear(builder.input(4, 2048, 4096), 16384))
    graph = builder.graph(builder.sum(builder.linear(hidden, 4096)))
    solution = BlockIlp(problem_of(graph, 8)).solve(1, MemoryPrice(0, 1e-9))
    states = {p.tensor: solution.assignment.sources[p.tensor].value for p in graph.parameters}
    assert states == {"weight0": Shard(0), "weight1": Shard(1)}
    local = localize(Localized.of(graph), solution.assignment).graph
    moved = [op.target for op in local.ops if op.target.startswith("autopar.")]
    assert moved in ([], ["autopar.all_reduce"], ["autopar.reduce_scatter"])


@cache
def decoder(*, tied: bool) -> OpGraph:
    """Two layers as wide as those of an eight-billion-parameter model, for one replica of two."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    capture = graphs.capture(model, lambda batch: {name: tokens(batch) for name in ("input_ids", "labels")})
    whole = capture.at(4)
    return localize(Localized.of(whole), data_parallel(whole, 2)).graph


def tokens(batch: int) -> torch.Tensor:
    return torch.zeros(batch, 4096, dtype=torch.long)


def keys_by_module(problem: AxisProblem, assignment: Assignment, target: str) -> dict[str, str]:
    pairs = zip(problem.graph.ops, assignment.choice, strict=True)
    return {op.module: strategy.key for op, strategy in pairs if op.target == target}


def test_finds_megatron_with_sequence_parallelism() -> None:
    """Where memory is dear, weights are split: columns then rows, heads in between, and norms along the
    sequence."""
    problem = problem_of(decoder(tied=False), 8)
    solution = BlockIlp(problem).solve(8, MemoryPrice(1e-13, 1e-11))
    assert isclose(price_s(problem, solution.assignment, 8), solution.time_s, rel_tol=1e-9)
    linear = keys_by_module(problem, solution.assignment, "aten.linear.default")
    for layer in (0, 1):
        prefix = f"model.layers.{layer}"
        assert [linear[f"{prefix}.mlp.{name}_proj"] for name in ("gate", "up", "down")] == ["o", "o", "h"]
        assert [linear[f"{prefix}.self_attn.{name}_proj"] for name in "qkvo"] == ["o", "o", "o", "h"]
        pow_ = keys_by_module(problem, solution.assignment, "aten.pow.Tensor_Scalar")
        assert pow_[f"{prefix}.input_layernorm"] == "d1"  # dimension 1 is the sequence
    attention = "aten.scaled_dot_product_attention.default"
    assert set(keys_by_module(problem, solution.assignment, attention).values()) == {"h"}


def test_finds_vocabulary_parallel_loss() -> None:
    problem = problem_of(decoder(tied=False), 8)
    solution = BlockIlp(problem).solve(8)
    local = localize(Localized.of(problem.graph), solution.assignment).graph
    (loss,) = (op for op in local.ops if op.target == "autopar.cross_entropy")
    assert loss.kwargs["class_axis"] == "tp"
    assert local.tensors[loss.inputs[0]].shape[-1] == 128256 // 8


def test_a_tied_table_is_split_by_vocabulary_at_both_ends() -> None:
    problem = problem_of(decoder(tied=True), 8)
    solution = BlockIlp(problem).solve(8, MemoryPrice(0, 1e-11))
    assert solution.assignment.sources["model.embed_tokens.weight"].value == Shard(0)
    local = localize(Localized.of(problem.graph), solution.assignment).graph
    assert any(op.target == "autopar.embedding" and op.kwargs["vocab_axis"] == "tp" for op in local.ops)


def test_dearer_memory_never_takes_more_of_it() -> None:
    problem = problem_of(decoder(tied=False), 8)
    stored, times_s = [], []
    for price in (0.0, 1e-13, 1e-12, 1e-11):
        solution = BlockIlp(problem).solve(8, MemoryPrice(0, price))
        stored.append(penalty_s(problem, solution.assignment, MemoryPrice(0, 1)))
        times_s.append(solution.time_s)
    assert stored == sorted(stored, reverse=True)
    assert all(after >= before * (1 - 1e-9) for before, after in pairwise(times_s))
    everything = sum(problem.graph.tensors[p.tensor].num_bytes for p in problem.graph.parameters)
    assert stored[-1] < 1.01 * everything / 8


def test_reductions_shared_by_more_microbatches_cost_less() -> None:
    problem = problem_of(decoder(tied=False), 8)
    once, often = BlockIlp(problem).solve(1), BlockIlp(problem).solve(64)
    assert often.time_s < once.time_s
    assert RP in often.assignment.sources.values()
