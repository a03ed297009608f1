"""Runs cases on a pool of ranks, with what they have in common made once: models, captures and references."""

from __future__ import annotations

import re
import shutil
import tempfile
import traceback
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from autopar.compiler import save_reference
from autopar.errors import AutoparError
from autopar.plan import Plan
from autopar.rewrite.program import Program, rewrite
from graphs import Capture, GraphError, capture
from tests.autopar.random_cases import EXPERTS, RandomCase, plan_for
from tests.autopar.rank_pool import shared_pool
from tests.models import case as model_case


@dataclass(frozen=True)
class Result:
    """What became of a plan: whether its program did as the original, was refused, or did something else.

    `difference` is the largest relative one of any gradient; `text` tells why, where it is not equal.
    """

    kind: Literal["equal", "refused", "failed"]
    difference: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class Original:
    """A model, its inputs for any batch, and its capture."""

    model: nn.Module
    inputs: Callable[[int], Mapping[str, Any]]
    capture: Capture


@cache
def original(name: str, dtype: torch.dtype) -> Original:
    """A model of `tests.models` in some dtype, the same at every call."""
    of_any_dtype = model_case(name)
    torch.manual_seed(0)
    model = of_any_dtype.build().to(dtype)
    inputs = partial(_inputs, of_any_dtype.inputs, dtype)
    return Original(model, inputs, capture(model, inputs, name=name))


def _inputs(inputs: Callable[[int], Mapping[str, Any]], dtype: torch.dtype, batch: int) -> dict[str, Any]:
    return {
        name: each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each
        for name, each in inputs(batch).items()
    }


class CaseRunner:
    """Writes programs and holds them against their originals for some steps; used in a `with` block."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._directory = Path(tempfile.mkdtemp(prefix="cases"))
        self._references: dict[tuple[object, ...], Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._directory)

    def run(self, case: RandomCase) -> Result:
        """What became of a random case."""
        try:
            given = original(case.model, case.dtype)
        except GraphError as error:
            return _refused(error)
        result = self.check(given, lambda: rewrite(given.capture, plan_for(case, given.capture)))
        return (
            replace(result, kind="equal")
            if is_rounding(result, case.model, case.parallelism.global_batch, given)
            else result
        )

    def fails(self, case: RandomCase, plan: Plan) -> bool:
        """Whether the program of a plan for the model of a case does something else, but for rounding."""
        given = original(case.model, case.dtype)
        result = self.check(given, lambda: rewrite(given.capture, plan))
        return result.kind == "failed" and not is_rounding(
            result, case.model, case.parallelism.global_batch, given
        )

    def check(self, given: Original, compiled: Callable[[], Program]) -> Result:
        """What becomes of a program of a model."""
        try:
            program = compiled()
            reference = self._reference(given, program)
        except (AutoparError, GraphError) as error:
            return _refused(error)
        except Exception:  # whatever it is, it is the result of this case
            return Result("failed", text=traceback.format_exc())
        directory = program.save(self._directory / "program", force=True)
        outcome = shared_pool().run(
            directory / "parity.py", program.plan.parallelism.world_size, "--reference", reference
        )
        shutil.rmtree(directory)
        found = re.search(r"gradients: largest relative difference (\S+)", outcome.output)
        difference = float(found[1]) if found else float("nan")
        if outcome.verdict == "equal":
            return Result("equal", difference)
        return Result("failed", difference, f"{outcome.verdict}\n{outcome.output}")

    def _reference(self, given: Original, program: Program) -> Path:
        """What the original does, made once for all programs with the same batches and precision."""
        p = program.plan.parallelism
        key = (id(given.model), p.microbatch_size, p.num_microbatches, p.dp, program.precision)
        if key not in self._references:
            path = self._directory / f"reference{len(self._references)}"
            path.mkdir(exist_ok=True)
            self._references[key] = save_reference(
                program, given.model, given.inputs, path, num_steps=self._num_steps
            )
        return self._references[key]


def is_rounding(result: Result, model: str, batch: int, given: Original) -> bool:
    """Whether a failure is that of half precision: gradients alone differ from the original's, and by no more
    than the roundings of both sides."""
    found = re.findall(r"(\w+): largest relative difference (\S+) of (\S+) allowed", result.text)
    dtype, *others = {each.dtype for each in given.model.parameters()}
    if result.kind != "failed" or not found or dtype.itemsize > 2 or others:
        return False
    allowed = 2 * own_rounding(model, dtype, batch)
    limits = {what: float(limit) for what, _, limit in found} | {"gradients": allowed}
    return all(float(off) <= limits[what] for what, off, _ in found)


@cache
def own_rounding(model: str, dtype: torch.dtype, batch: int) -> float:
    """How far the gradients of a model in half precision are from those in a wider one, of the same weights
    in one process, added up over microbatches of two samples: the largest relative norm of the difference of
    any parameter that has a gradient. It is a matter of the batch, whose samples may cancel."""
    gradients = []
    for each in (dtype, torch.float32 if model in EXPERTS else torch.float64):
        module = deepcopy(original(model, dtype).model).to(each).train()
        inputs = original(model, each).inputs(batch)
        for first in range(0, batch, 2):
            output = module(**{name: value[first : first + 2] for name, value in inputs.items()})
            ((output if isinstance(output, Tensor) else output["loss"]) * 2 / batch).backward()
        found = {name: weight.grad for name, weight in module.named_parameters()}
        gradients.append({name: grad.double() for name, grad in found.items() if grad is not None})
    largest = max(float(each.abs().max()) for each in gradients[1].values())
    felt = largest * torch.finfo(dtype).eps
    return max(
        float((gradients[0][name] - wide).norm() / wide.norm())
        for name, wide in gradients[1].items()
        if float(wide.abs().max()) > felt
    )


def _refused(error: Exception) -> Result:
    return Result("refused", text=f"{type(error).__name__}: {str(error).splitlines()[0]}")
