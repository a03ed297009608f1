"""Every rule, held against torch: what it says may be split is split by hand and must give the same."""

from __future__ import annotations

import pytest
import torch

from tests.graphs.rule_cases import CASES
from tests.graphs.rule_harness import (
    NUM_SHARDS,
    Case,
    record,
    run,
    run_split,
    shard,
    shards_of,
    splittable,
    unshard,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_equal(made: torch.Tensor, whole: torch.Tensor, what: str) -> None:
    atol, rtol = (0.1, 0.05) if whole.dtype == torch.bfloat16 else (None, None)
    torch.testing.assert_close(made, whole, atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}")


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
        local = run_split(call, factor, shards_of(call, factor))
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
    operands = [track(t, i not in case.constants) for i, t in enumerate(call.operands)]
    made = run(call.op, operands)
    targets = [i for i, result in enumerate(made) if result.requires_grad]
    if not targets:
        pytest.skip("nothing here has a gradient")
    tracked = [i for i, operand in enumerate(operands) if operand.requires_grad]
    cotangents = {i: torch.randn_like(made[i]) for i in targets}
    expected = gradients(
        [made[i] for i in targets], [operands[i] for i in tracked], list(cotangents.values())
    )
    for factor in splittable(call.rule):
        shards = [[track(t, i in tracked) for i, t in enumerate(ts)] for ts in shards_of(call, factor)]
        local = run_split(call, factor, shards)
        # A result that is whole on every rank is one result: its gradient enters once.
        ranks = [0] if factor in call.rule.whole else range(NUM_SHARDS)
        found = gradients(
            [local[rank][i] for rank in ranks for i in targets],
            [shards[rank][i] for i in tracked for rank in range(NUM_SHARDS)],
            [shard(call.rule, "result", i, cotangents[i], factor, rank) for rank in ranks for i in targets],
        )
        for position, i in enumerate(tracked):
            terms = found[position * NUM_SHARDS : (position + 1) * NUM_SHARDS]
            held = any(factor in dim for dim in call.rule.operands[i])
            whole = unshard(call.rule, "operand", i, terms, factor) if held else torch.stack(terms).sum(0)
            assert_equal(whole, expected[position], f"factor {factor}, gradient of operand {i}")


def track(tensor: torch.Tensor, wanted: bool) -> torch.Tensor:
    return tensor.clone().requires_grad_(wanted and (tensor.is_floating_point() or tensor.is_complex()))


def gradients(
    results: list[torch.Tensor], operands: list[torch.Tensor], cotangents: list[torch.Tensor]
) -> list[torch.Tensor]:
    found = torch.autograd.grad(results, operands, cotangents, allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(operands, found, strict=True)]


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
