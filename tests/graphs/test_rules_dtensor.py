"""Our rules against torch's DTensor, on one mesh axis, for every op that both know.

What we offer DTensor should take as it is, and what it takes as it is we should offer. Where they differ, a
reason is on record here; one that no longer applies fails as well. A difference does not tell which side is
right: our splits are checked with numbers in `test_rules.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from graphs.rules import registry
from tests.graphs.dtensor_cases import MORE, with_strategy
from tests.graphs.dtensor_oracle import answer, fake_mesh, known, ours, theirs
from tests.graphs.rule_cases import CASES
from tests.graphs.rule_harness import record

Explained = Mapping[str, Mapping[str, str]]
"""By reason and operator, patterns of strategies separated by `;`, `*` for anything."""

pytestmark = pytest.mark.filterwarnings("ignore:DTensor random operators")

_LINEAR = "linear*"

WE_OFFER: Explained = {
    "DTensor reduces partial sums before it": {
        **dict.fromkeys(
            (
                *("adaptive_avg_pool2d", "clone", "cumsum", "dot", "einsum", "embedding", "gather"),
                *("masked_fill", "mean", "nll_loss_nd", "pixel_shuffle", "pixel_unshuffle"),
                *("repeat_interleave", "scaled_dot_product_attention", "scatter", "scatter_add"),
                *("select_scatter", "slice_scatter", "where", "diagonal", "tril", "triu"),
            ),
            _LINEAR,
        ),
    },
    "parts of sections or of products of factors, which its strategy of the op does not read": {
        "cat": "d1",
        "chunk": "d1",
        "glu": "d1",
        "narrow": "d1",
        "repeat": "d2",
        "reshape": "d3",
        "scaled_dot_product_attention": "g",
        "slice": "d1",
        "split": "d1",
        "split_with_sizes": "d1",
        "tile": "d1",
    },
    "it makes whole what no operand has split": {
        "expand": "d0;d2",
        "meshgrid": "d0;d1",
        "new_empty": "*",
        "new_full": "*",
        "new_ones": "*",
        "new_zeros": "*",
        "repeat": "r0;r2",
    },
    "its pieces of the op reshape or expand what is split": {
        "batch_norm": "n;s0",
        "group_norm": "g",
        "instance_norm": "n;c",
        "matmul": "d0;d1;linear*",
    },
    "its attention splits batch and heads of every operand, a broadcast mask too": {
        "scaled_dot_product_attention": "d0;h;s",
    },
    "it has a local form of its own only where asked for (`loss_parallel`)": {"cross_entropy_loss": "c"},
    "it splits only the input of a convolution": {"conv*": "i;o;g;linear*"},
    "it splits no dimension of a diagonal or a triangle": {"diagonal": "d0", "tril": "d0", "triu": "d0"},
}

DTENSOR_OFFERS: Explained = {
    "a split sum with a partial bias: biases are added apart in a captured graph": {
        "addmm": "P S1 S0 -> P",
        "baddbmm": "P S2 S1 -> P",
        "linear": "S2 S1 P -> P",
    },
    "an operand of which only shape or dtype is read": {
        "*_like": "P -> R;P -> P",
        "new_*": "S? -> R;P -> R",
        "type_as": "* P -> *",
    },
    "it is absent from a captured graph: dropout in evaluation, squeeze of what may be larger": {
        "dropout": "P -> P",
        "squeeze": "S? -> S?",
    },
    "linear in what is no partial sum: the weight of a norm, labels": {
        "_fused_rms_norm": "R P -> P R",
        "cross_entropy_loss": "R P -> P",
        "rms_norm": "R P -> P",
    },
    "not linear where an element is NaN or infinite": {"nansum": "P -> P", "special_xlog1py": "P R -> P"},
    "a sum of booleans": {"any": "S? -> P"},
    "it gathers and compares the winners of every rank": {"argmax": "S1 -> R", "argmin": "S1 -> R"},
    "an average, though ranks may count different numbers of targets": {
        "cross_entropy_loss": "S* -> P(avg)",
        "nll_loss_nd": "S* -> P(avg)",
    },
    "the gradient divides by counts of the whole batch": {"embedding": "S0 R -> P;R S0 -> S0"},
    "values narrower than keys have no fused kernel": {"scaled_dot_product_attention": "R R S? R -> S?"},
    "an average over the image, which stays whole": {"adaptive_avg_pool*d": "S? -> P(avg)"},
    "it treats the results one by one": {"meshgrid": "*"},
    "wrong: the placement of the weight is not read": {"conv*": "*"},
    "wrong: rows of the index are not those of the source": {"gather": "S0 S0 -> S0"},
}


@dataclass
class Comparison:
    """Operators and strategies compared, how often each reason applied, and differences without one."""

    operators: set[str] = field(default_factory=set)
    num_agreed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    used: set[tuple[str, str]] = field(default_factory=set)
    unexplained: list[str] = field(default_factory=list)

    def differ(self, target: str, strategy: str, explained: Explained, text: str) -> None:
        name = target.split(".")[1]
        for reason, patterns in explained.items():
            for operator, strategies in patterns.items():
                if fnmatchcase(name, operator):
                    for pattern in strategies.split(";"):
                        if fnmatchcase(strategy, pattern):
                            self.reasons[reason] += 1
                            self.used.add((reason, operator))
                            return
        self.unexplained.append(f"{target} {text}")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    found = Comparison()
    with fake_mesh() as mesh, torch.no_grad():
        for case in (*CASES, *MORE):
            call = record(case)
            if not call.operands or not known(call, mesh):
                continue
            found.operators.add(case.target)
            agreed = set()
            for key, strategy in ours(call).items():
                made = answer(call, mesh, strategy[0]) if strategy is not None else None
                if strategy is not None and made == strategy[1]:
                    agreed.add(made)
                else:
                    text = f"{key}: {strategy and strategy[1]} is {made} to DTensor"
                    found.differ(case.target, key, WE_OFFER, text)
            found.num_agreed += len(agreed)
            for layout in theirs(call, mesh):
                if layout not in agreed and not _other_reduction(layout):
                    found.differ(case.target, layout, DTENSOR_OFFERS, f"{layout} is unknown to us")
    return found


def _other_reduction(layout: str) -> bool:
    """Partial in a way that does not add up, such as a maximum: no placement of ours."""
    return "P(" in layout.replace("P(avg)", "")


def test_every_difference_has_a_reason(comparison: Comparison) -> None:
    assert not comparison.unexplained, "\n".join(comparison.unexplained)


def test_every_reason_has_a_difference(comparison: Comparison) -> None:
    given = {
        (reason, operator)
        for explained in (WE_OFFER, DTENSOR_OFFERS)
        for reason, patterns in explained.items()
        for operator in patterns
    }
    assert given == comparison.used


def test_every_operator_that_both_know_is_compared(comparison: Comparison) -> None:
    """But those that write into an operand, and `equal`, whose result is no tensor."""
    both = {
        str(op)
        for op in with_strategy()
        if op.namespace == "aten" and not op._schema.is_mutable and registry._find(str(op)) is not None
    }
    assert both - comparison.operators == {"aten.equal.default"}


def test_the_numbers_in_the_documentation(comparison: Comparison) -> None:
    text = (Path(__file__).parents[2] / "docs/rules.md").read_text()
    made = table(comparison)
    assert made in text, f"docs/rules.md should say:\n{made}"


def table(comparison: Comparison) -> str:
    """What `docs/rules.md` shows."""
    rows = {
        "operators known to both": len(comparison.operators),
        "strategies in agreement": comparison.num_agreed,
        **{f"only ours: {reason}": comparison.reasons[reason] for reason in WE_OFFER},
        **{f"only DTensor's: {reason}": comparison.reasons[reason] for reason in DTENSOR_OFFERS},
    }
    return "\n".join(
        ["| | number |", "| --- | ---: |", *(f"| {what} | {count} |" for what, count in rows.items())]
    )
