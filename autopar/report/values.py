"""What a report says, as plain values with their units: the renderers only lay them out."""

from __future__ import annotations

from dataclasses import dataclass


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
