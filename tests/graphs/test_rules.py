"""Every rule, held against torch: what it says may be split is split by hand and must give the same."""

from __future__ import annotations

import pytest
import torch

from tests.graphs.rule_cases import CASES
from tests.graphs.rule_harness import NUM_SHARDS, Case, record, run, run_split, shard, splittable, unshard


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_equal(made: torch.Tensor, whole: torch.Tensor, what: str) -> None:
    tolerance = {"atol": 0.1, "rtol": 0.05} if whole.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(made, whole, msg=lambda text: f"{what}: {text}", **tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_offers_exactly_these_splits(case: Case) -> None:
    rule = record(case).rule
    offered = {f"+{factor}" if factor in rule.reductions else factor for factor in splittable(rule)}
    assert offered == set(case.splits.split())
    assert {"".join(map(str, sorted(members))) for members in rule.linear} == set(case.linear.split())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_make_the_whole_result(case: Case) -> None:
    call = record(case)
    for factor in splittable(call.rule):
        shards = [
            [shard(call.rule, "operand", i, tensor, factor, rank) for i, tensor in enumerate(call.operands)]
            for rank in range(NUM_SHARDS)
        ]
        local = run_split(call, factor, shards)
        for index, whole in enumerate(call.results):
            parts = [results[index] for results in local]
            if factor in call.rule.reductions:
                made = torch.stack(parts).sum(0)
            elif factor in call.rule.whole:
                made = parts[0]
            else:
                made = unshard(call.rule, "result", index, parts, factor)
            assert_equal(made, whole, f"factor {factor}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operands_without_the_factor_get_partial_gradients(case: Case) -> None:
    """The backward reading: the gradient of a split operand is the slice of the whole one, that of an operand
    which every rank has whole is the sum of what the ranks compute."""
    call = record(case)
    differentiable = [
        i for i, tensor in enumerate(call.operands) if tensor.is_floating_point() and i not in case.constants
    ]
    targets = [i for i, tensor in enumerate(call.results) if tensor.is_floating_point()]
    if not differentiable or not targets:
        pytest.skip("nothing here has a gradient")
    cotangents = [torch.randn_like(result) for result in call.results if result.is_floating_point()]
    whole = [tensor.clone().requires_grad_(i in differentiable) for i, tensor in enumerate(call.operands)]
    made = [run(call.op, whole)[i] for i in targets]
    if not any(result.requires_grad for result in made):
        pytest.skip("torch has no gradient here")
    expected = torch.autograd.grad(
        sum((c * r).sum() for c, r in zip(cotangents, made, strict=True)),
        [whole[i] for i in differentiable],
        allow_unused=True,
    )
    for factor in splittable(call.rule):
        shards = [
            [
                shard(call.rule, "operand", i, tensor, factor, rank)
                .clone()
                .requires_grad_(i in differentiable)
                for i, tensor in enumerate(call.operands)
            ]
            for rank in range(NUM_SHARDS)
        ]
        local = run_split(call, factor, shards)
        ranks = [0] if factor in call.rule.whole else range(NUM_SHARDS)
        total = sum(
            (shard(call.rule, "result", i, c, factor, rank) * local[rank][i]).sum()
            for rank in ranks
            for i, c in zip(targets, cotangents, strict=True)
        )
        leaves = [shards[rank][i] for i in differentiable for rank in range(NUM_SHARDS)]
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        for position, i in enumerate(differentiable):
            parts = gradients[position * NUM_SHARDS : (position + 1) * NUM_SHARDS]
            if expected[position] is None:
                assert all(part is None or not part.any() for part in parts)
                continue
            terms = [torch.zeros_like(shards[0][i]) if part is None else part for part in parts]
            held = any(factor in dim for dim in call.rule.operands[i])
            gradient = unshard(call.rule, "operand", i, terms, factor) if held else torch.stack(terms).sum(0)
            assert_equal(gradient, expected[position], f"factor {factor}, gradient of operand {i}")


@pytest.mark.parametrize("case", [case for case in CASES if case.linear], ids=str)
def test_partial_operands_give_partial_results(case: Case) -> None:
    """Jointly linear operands, each written as a sum of two terms, give results that sum to the whole."""
    call = record(case)
    for members in call.rule.linear:
        for i in members:
            assert call.operands[i].dtype.is_floating_point or call.operands[i].dtype.is_complex
        first = [torch.randn_like(t) if i in members else t for i, t in enumerate(call.operands)]
        second = [t - first[i] if i in members else t for i, t in enumerate(call.operands)]
        for a, b, whole in zip(run(call.op, first), run(call.op, second), call.results, strict=True):
            assert_equal(a + b, whole, f"linear in {set(members)}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_dimensions_are_the_products_of_their_factors(case: Case) -> None:
    call = record(case)
    for side, tensors, dims in (
        ("operand", call.operands, call.rule.operands),
        ("result", call.results, call.rule.results),
    ):
        for index, (tensor, names) in enumerate(zip(tensors, dims, strict=True)):
            assert len(names) == tensor.dim()
            for dim, held in enumerate(names):
                parts = call.rule.sections.get((side, index, dim), (tensor.shape[dim],))
                assert sum(parts) == tensor.shape[dim]
                assert all(part % call.rule.sizes[name] == 0 for part in parts for name in held)
