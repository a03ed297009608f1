"""What there is to say about a plan, as plain values: the renderers only lay it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autopar.errors import AutoparError
from autopar.module_paths import module_ranges
from autopar.plan import Parallelism, Plan, Recomputation
from autopar.ranks import RankGroups
from costmodel import end_to_end_training_s, scale_factor, stage_ranks

COMPUTING = frozenset({"compute", "recompute", "pipeline_bubble", "optimizer"})
"""Terms of a step that are no communication; every other term is communication that nothing hides."""


@dataclass(frozen=True)
class Verdict:
    """The answer in one glance; `gap` is how far from the optimum it can be, as a share of the step."""

    status: str
    gap: float
    fits: bool
    parallelism: str
    step_s: float
    tokens_per_s: float
    mfu: float
    model_flops_per_s_per_device: float
    peak_memory_bytes: float
    memory_bytes: float
    exposed_communication_s: float
    scale_factor: float | None


@dataclass(frozen=True)
class Training:
    """Time to a token budget: by the plan's own step time, and by the formula of arXiv:2104.04473."""

    tokens: float
    predicted_s: float
    formula: str
    formula_s: float
    price_usd: float | None


@dataclass(frozen=True)
class Axis:
    """One mesh axis; its ranks are `stride` apart."""

    name: str
    size: int
    stride: int
    within_node: bool
    meaning: str


@dataclass(frozen=True)
class Ranks:
    """Who communicates along an axis, and on which links. A group is a start plus every sum of multiples of
    the strides of `members`, (count, stride) innermost first, and the starts are such sums of `starts`;
    `first` shows two groups."""

    axis: str
    size: int
    stride: int
    num_groups: int
    members: tuple[tuple[int, int], ...]
    starts: tuple[tuple[int, int], ...]
    first: str
    links: str


@dataclass(frozen=True)
class Placement:
    """How one parameter (or the like-named parameters of all instances of a block) lies on the mesh."""

    parameter: str
    placement: str


@dataclass(frozen=True)
class Block:
    """A group of parameters under one module path; `*` stands for every instance."""

    path: str
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class Operation:
    """Ops of one kind that are split alike: the strategy on each axis, and the number of distinct ops."""

    kind: str
    count: int
    strategies: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, in seconds per microbatch and bytes at its peak."""

    index: int
    rank: int
    modules: tuple[str, ...]
    forward_s: float
    backward_s: float
    peak_memory_bytes: float
    memory_bytes: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Pool:
    """One kind of device: the part of the pipeline that runs on it, and who communicates there, on ranks that
    count from the pool's first one."""

    cluster: str
    device: str
    num_devices: int
    collective_library: str
    first_rank: int
    first_stage: int
    num_stages: int
    parallelism: str
    ranks: tuple[Ranks, ...]


@dataclass(frozen=True)
class Recomputed:
    """Blocks, ranges abbreviated, whose backward computes again what `what` says."""

    blocks: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Term:
    """Part of the step time; the terms add up to it."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True)
class RunnerUp:
    """A plan that lost, and why."""

    label: str
    parallelism: str
    step_s: float | None
    peak_memory_bytes: float | None
    reason: str


@dataclass(frozen=True)
class PinPrice:
    """What one of the user's pins costs: a step without it, and how much longer it is for the pin."""

    pin: str
    step_s: float
    cost_s: float


@dataclass(frozen=True)
class SearchLayer:
    """What one layer of the search solved: the size is that of its largest problem, `cpu_s` the processor
    time of all, None for a plan that was read from a file."""

    name: str
    num_problems: int
    num_variables: int
    num_rows: int
    num_integer: int
    cpu_s: float | None


@dataclass(frozen=True)
class Search:
    """What was looked at, and what each layer of the search had to solve for it."""

    num_candidates: int
    num_solved: int
    pruned: tuple[tuple[str, int], ...]
    bound_s: float
    layers: tuple[SearchLayer, ...]


@dataclass(frozen=True)
class Report:
    """A plan, explained."""

    model: str
    num_parameters: int
    cluster: str
    num_devices: int
    device: str
    global_batch: int
    tokens_per_step: int
    verdict: Verdict
    training: Training | None
    axes: tuple[Axis, ...]
    ranks: tuple[Ranks, ...]
    settings: tuple[tuple[str, str], ...]
    pools: tuple[Pool, ...]
    blocks: tuple[Block, ...]
    operations: tuple[Operation, ...]
    stages: tuple[Stage, ...]
    recomputation: tuple[Recomputed, ...]
    terms: tuple[Term, ...]
    runners_up: tuple[RunnerUp, ...]
    pins: tuple[PinPrice, ...]
    search: Search
    warnings: tuple[str, ...]


def view(plan: Plan, token_budget: float | None = None) -> Report:
    """The report of `plan`; with `token_budget`, the training time for that many tokens.

    Raises AutoparError for a budget that is not positive.
    """
    return Report(
        model=plan.model.name,
        num_parameters=plan.model.num_parameters,
        cluster=plan.cluster.name,
        num_devices=_num_devices(plan),
        device=plan.cluster.device,
        global_batch=plan.parallelism.global_batch,
        tokens_per_step=plan.parallelism.global_batch * plan.model.tokens_per_sample,
        verdict=_verdict(plan),
        training=None if token_budget is None else _training(plan, token_budget),
        axes=() if plan.pools else _axes(plan),
        ranks=_ranks(plan.rank_groups),
        settings=_settings(plan.parallelism, plan.prediction.software),
        pools=_pools(plan),
        blocks=_blocks(plan),
        operations=_operations(plan),
        stages=_stages(plan),
        recomputation=tuple(
            Recomputed(module_ranges(each.blocks), _computed_again(each)) for each in plan.recomputation
        ),
        terms=_terms(plan),
        runners_up=tuple(
            RunnerUp(a.label, str(a.parallelism), a.step_s, a.peak_memory_bytes, a.reason)
            for a in plan.alternatives
        ),
        pins=tuple(PinPrice(each.pin, each.step_s, each.cost_s) for each in plan.pin_costs),
        search=Search(
            plan.certificate.num_candidates,
            plan.certificate.num_solved,
            tuple(plan.certificate.pruned.items()),
            plan.certificate.bound_s,
            tuple(
                SearchLayer(
                    each.layer,
                    each.num_problems,
                    each.num_variables,
                    each.num_rows,
                    each.num_integer,
                    each.cpu_s,
                )
                for each in plan.certificate.layers
            ),
        ),
        warnings=plan.warnings,
    )


def _computed_again(each: Recomputation) -> str:
    """What blocks compute again, in words."""
    if each.mode == "kept":
        return f"all but {', '.join(each.labels)}"
    return {
        "attention": "the probabilities of attention",
        "alternate": "all but attention, what was received and every second matrix product",
        "selective": "all but matrix products, attention and what was received",
        "full": "all",
    }[each.mode]


def _verdict(plan: Plan) -> Verdict:
    predicted, world_size = plan.prediction, _num_devices(plan)
    exposed_s = sum(seconds for name, seconds in predicted.terms_s.items() if name not in COMPUTING)
    scaling = None
    if predicted.single_device_step_s is not None:
        samples = plan.parallelism.global_batch
        scaling = scale_factor(
            samples / predicted.single_device_step_s, samples / predicted.step_s, world_size
        )
    return Verdict(
        status=plan.certificate.status,
        gap=plan.certificate.gap,
        fits=plan.fits,
        parallelism=" -> ".join(str(pool.parallelism) for pool in plan.pools) or str(plan.parallelism),
        step_s=predicted.step_s,
        tokens_per_s=predicted.tokens_per_s,
        mfu=predicted.mfu,
        model_flops_per_s_per_device=predicted.model_flops_per_s_per_device,
        peak_memory_bytes=predicted.peak_memory_bytes,
        memory_bytes=plan.cluster.memory_bytes,
        exposed_communication_s=exposed_s,
        scale_factor=scaling,
    )


def _training(plan: Plan, tokens: float) -> Training:
    """Both figures for `tokens`.

    In the formula X counts the FLOPs that a device really executes. With full recomputation these are 8/6 of
    the model's own, so X is that much higher than the model FLOP rate that the plan states.
    """
    if not tokens > 0:
        raise AutoparError(f"a token budget is a positive number, got {tokens:g}")
    recompute = plan.parallelism.recompute == "full"
    executed_flops_per_s = plan.prediction.model_flops_per_s_per_device * (8 / 6 if recompute else 1)
    world_size = _num_devices(plan)
    predicted_s = tokens / plan.prediction.tokens_per_s
    price = plan.cluster.price_usd_per_device_hour
    return Training(
        tokens=tokens,
        predicted_s=predicted_s,
        formula="8TP/(nX)" if recompute else "6TP/(nX)",
        formula_s=end_to_end_training_s(
            tokens, plan.model.num_parameters, world_size, executed_flops_per_s, recompute
        ),
        price_usd=None if price is None else price * world_size * predicted_s / 3600,
    )


def _axes(plan: Plan) -> tuple[Axis, ...]:
    p = plan.parallelism
    zero = {
        0: "every replica holds the whole training state",
        1: "ZeRO-1: optimizer states sharded",
        2: "ZeRO-2: optimizer states and gradients sharded",
        3: "ZeRO-3: parameters, gradients and optimizer states sharded",
    }[p.zero_stage]
    meanings = {
        "pp": f"pipeline of {p.pp * p.num_virtual_stages} stages, schedule {p.schedule}",
        "dp_replicate": "data-parallel replicas",
        "dp_shard": f"data-parallel replicas; {zero}",
        "cp": "context parallel: the sequence is split, keys and values are gathered",
        "tp": "tensor and sequence parallel, op by op as listed below",
    }
    found = []
    stride = p.world_size
    for name, size in p.mesh.items():
        stride //= size
        found.append(Axis(name, size, stride, stride * size <= plan.cluster.devices_per_node, meanings[name]))
    return tuple(found)


def _num_devices(plan: Plan) -> int:
    """Devices that the plan uses."""
    return plan.cluster.num_devices if plan.pools else plan.parallelism.world_size


def _pools(plan: Plan) -> tuple[Pool, ...]:
    return tuple(
        Pool(
            pool.cluster.id,
            pool.cluster.device,
            pool.cluster.num_devices,
            pool.collective_library,
            pool.first_rank,
            pool.first_stage,
            pool.parallelism.pp,
            str(pool.parallelism),
            _ranks(pool.rank_groups),
        )
        for pool in plan.pools
    )


def _ranks(groups: Iterable[RankGroups]) -> tuple[Ranks, ...]:
    return tuple(
        Ranks(
            each.axis,
            each.size,
            each.stride,
            each.num_groups,
            each.members,
            each.starts,
            each.first,
            each.met_on,
        )
        for each in groups
    )


def _settings(p: Parallelism, software: str) -> tuple[tuple[str, str], ...]:
    settings = [
        ("microbatches", f"{p.num_microbatches} of {p.microbatch_size} samples on each of {p.dp} replicas"),
        ("recompute", p.recompute),
        ("ZeRO stage", str(p.zero_stage)),
        ("software", software),
    ]
    if p.ep > 1:
        settings.append(("experts", f"divided over {p.ep} of the data-parallel ranks"))
    return tuple(settings)


def group_placements(placements: Mapping[str, str]) -> tuple[Block, ...]:
    """Parameters by block; those whose names differ in the block's number alone are one where they agree."""
    by_pattern: dict[str, set[str]] = {}
    for name, placement in placements.items():
        by_pattern.setdefault(_pattern(name), set()).add(placement)
    groups: dict[str, dict[str, str]] = {}
    for name, placement in placements.items():
        pattern = _pattern(name)
        shown = pattern if len(by_pattern[pattern]) == 1 else name
        path = _container(shown)
        groups.setdefault(path, {})[shown.removeprefix(f"{path}.")] = placement
    return tuple(
        Block(path, tuple(Placement(name, placement) for name, placement in group.items()))
        for path, group in groups.items()
    )


def _blocks(plan: Plan) -> tuple[Block, ...]:
    """Parameters by block, where there are pools for each of them."""
    if not plan.pools:
        return group_placements(plan.placements)
    return tuple(
        Block(f"{pool.cluster.id}: {block.path}", block.placements)
        for pool in plan.pools
        for block in group_placements(pool.placements)
    )


def _pattern(parameter: str) -> str:
    """The name with `*` for the numbers of repeated blocks."""
    return ".".join("*" if part.isdigit() else part for part in parameter.split("."))


def _container(parameter: str) -> str:
    """The outermost numbered block that a parameter belongs to, else its module."""
    parts = parameter.split(".")
    ends = [index + 1 for index, part in enumerate(parts) if part == "*" or part.isdigit()]
    return ".".join(parts[: ends[0]] if ends else parts[:-1])


def _operations(plan: Plan) -> tuple[Operation, ...]:
    """Distinct ops counted by kind and strategies, in the order of the graph, where there are pools for each
    of them."""
    parts = [(f"{pool.cluster.id}: ", pool.strategies) for pool in plan.pools] or [("", plan.strategies)]
    axes = list(dict.fromkeys(axis for _, strategies in parts for axis in strategies))
    alike = Counter(
        (
            pool + _kind(name),
            tuple((axis, strategies.get(axis, {}).get(name, "replicate")) for axis in axes),
        )
        for pool, strategies in parts
        for name in dict.fromkeys(name for by_op in strategies.values() for name in by_op)
    )
    return tuple(Operation(kind, count, strategies) for (kind, strategies), count in alike.items())


def _kind(op: str) -> str:
    """`linear_12` is a `linear`."""
    stem, _, number = op.rpartition("_")
    return stem if stem and number.isdigit() else op


def _stages(plan: Plan) -> tuple[Stage, ...]:
    p = plan.parallelism
    ranks = stage_ranks(p.schedule, p.pp, p.num_virtual_stages)
    return tuple(
        Stage(
            stage.index,
            ranks[stage.index],
            stage.modules,
            stage.forward_s,
            stage.backward_s,
            stage.peak_memory_bytes,
            tuple(stage.memory_bytes.items()),
        )
        for stage in plan.stages
    )


def _terms(plan: Plan) -> tuple[Term, ...]:
    step_s = plan.prediction.step_s
    terms = [
        Term(name, seconds, seconds / step_s) for name, seconds in plan.prediction.terms_s.items() if seconds
    ]
    return tuple(sorted(terms, key=lambda term: -term.seconds))
