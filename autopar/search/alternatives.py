"""Why other plans lost: runners-up, plain data parallelism, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping

from autopar.plan import Alternative, Parallelism
from autopar.search.evaluate import Evaluated
from autopar.search.outcome import Solved
from autopar.search.planner import Planner, SearchResult
from autopar.search.wording import duration, size

TERM_NAMES: Mapping[str, str] = {
    "compute": "compute",
    "recompute": "recomputation",
    "tensor_parallel": "tensor-parallel communication",
    "parameter_gather": "parameter gathering",
    "send_recv": "pipeline messages",
    "pipeline_bubble": "pipeline bubble",
    "gradient_sync": "gradient synchronisation",
    "optimizer": "optimizer",
    "overhead": "overhead",
}


def alternatives(planner: Planner, result: SearchResult, best: Evaluated) -> list[Alternative]:
    """The runners-up of the plan and plain data parallelism, and why each lost."""
    found = [_alternative(str(other.parallelism), other, best) for other in result.runners_up]
    for label, other in result.baselines.items():
        found.append(
            _impossible_baseline(label, planner.global_batch, planner.cluster.num_devices)
            if other is None
            else _alternative(label, other, best)
        )
    return found


def _alternative(label: str, solved: Solved, best: Evaluated) -> Alternative:
    evaluated = solved.evaluated
    return Alternative(
        label=label,
        parallelism=Parallelism.model_validate(evaluated.parallelism.model_dump()),
        step_s=evaluated.step_s,
        peak_memory_bytes=evaluated.peak_memory_bytes,
        reason=_why_worse(evaluated, best),
    )


def _impossible_baseline(label: str, global_batch: int, num_devices: int) -> Alternative:
    """Plain data parallelism over all devices, where the batch does not divide over them."""
    sharded = label == "FSDP"
    return Alternative(
        label=label,
        parallelism=Parallelism(
            dp_shard=num_devices if sharded else 1,
            dp_replicate=1 if sharded else num_devices,
            zero_stage=3 if sharded else 0,
        ),
        step_s=None,
        peak_memory_bytes=None,
        reason=f"a global batch of {global_batch} does not divide over {num_devices} replicas",
    )


def _why_worse(evaluated: Evaluated, best: Evaluated) -> str:
    if not evaluated.fits:
        return memory_excess(evaluated)
    if evaluated.parallelism == best.parallelism:
        return "this is the plan"
    extra = {name: seconds - best.step.terms[name] for name, seconds in evaluated.step.terms.items()}
    worst = max(extra, key=lambda name: extra[name])
    ratio = evaluated.step_s / best.step_s
    factor = f"{ratio:.2f}x slower" if ratio >= 1.005 else f"{100 * (ratio - 1):.1g} % slower"
    return f"{factor}: {TERM_NAMES[worst]} +{duration(extra[worst])}"


def memory_excess(evaluated: Evaluated) -> str:
    """By how much a candidate exceeds memory, and its largest entries."""
    if evaluated.excess_bytes == evaluated.host_excess_bytes:
        return f"out of the host's memory by {size(evaluated.excess_bytes)}: offloaded optimizer states"
    fullest = max(evaluated.ledgers, key=lambda ledger: ledger.total_bytes)
    entries = sorted(fullest.entries.items(), key=lambda entry: -entry[1])
    largest = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in entries[:2])
    return f"out of memory by {size(evaluated.excess_bytes)} in the {fullest.moment}: {largest}"
