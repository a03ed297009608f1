"""Whatever a search may one day choose trains as the original does: random cases of every model and form.

`python -m benchmarks.fuzz` runs thousands of these.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.autopar.case_runner import CaseRunner
from tests.autopar.random_cases import forms_of, random_case
from tests.models import ALL

NUM_CASES = 8
"""Of each model; their forms follow one another from model to model, so that all are there."""


@pytest.fixture(scope="module")
def runner() -> Iterator[CaseRunner]:
    with CaseRunner(num_steps=1) as runner:
        yield runner


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("model", [each.name for each in ALL])
def test_random_programs_equal_their_originals(runner: CaseRunner, model: str) -> None:
    forms = forms_of(model)
    first = [each.name for each in ALL].index(model) * NUM_CASES
    cases = [random_case(model, forms[seed % len(forms)], seed) for seed in range(first, first + NUM_CASES)]
    results = [(case, runner.run(case)) for case in cases]
    failed = [f"{case}\n{case.recipe}\n{result.text}" for case, result in results if result.kind == "failed"]
    refused = [result.text for _, result in results if result.kind == "refused"]
    assert not failed, "\n\n".join(failed)
    assert len(refused) <= NUM_CASES // 2, f"too much is refused: {refused}"
