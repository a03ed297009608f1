"""The plan: everything that was decided about how to train a model, and what it is predicted to cost.

A `Plan` is a frozen value with a deterministic JSON form. The rewriter, the report and the launchers read it
and nothing else; it does not refer to the search that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

import costmodel
from autopar.ranks import RankGroups
from costmodel import OptimizerPolicy

PLAN_VERSION: Literal[4] = 4

RecomputeMode = Literal["none", "attention", "alternate", "selective", "full"]
"""What the backward computes again of a block: nothing; the probabilities of attention, where its kernel
keeps them (Megatron's selective recomputation, arXiv:2205.05198, section 5); all but matrix products and
attention ("selective"), of the products every second one too ("alternate", torchtitan's default); everything.
"""
Recompute = Literal[RecomputeMode, "mixed"]
"""The mode of all blocks, or "mixed": blocks differ, or keep some results by name (`Plan.recomputation`)."""
Offload = Literal["none", "optimizer"]
"""What lives in the host's memory: nothing, or the optimizer's states and master copy, which the host then
updates (ZeRO-Offload, arXiv:2101.06840)."""
MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The axes of every mesh, outermost first as they usually lie."""
ScheduleName = costmodel.ScheduleName
"""Pipeline schedules by torch's names."""


def has_program(schedule: ScheduleName, num_stages: int, num_microbatches: int) -> bool:
    """Whether a pipeline can be emitted: torch's 1F1B refuses fewer microbatches than stages, which its other
    schedules run."""
    return schedule != "1F1B" or num_microbatches >= num_stages


class Frozen(BaseModel):
    """A value: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Parallelism(Frozen):
    """The degrees of every kind of parallelism, and the knobs that go with them.

    Ranks are laid out row-major over the mesh `(pp, dp_replicate, dp_shard, cp, tp)`, so `tp` is innermost,
    unless `axis_order` puts the same axes into another order, outermost first. The global batch is
    `microbatch_size * num_microbatches * dp`. `ep` divides the data-parallel ranks among experts.
    `sequence_parallel` says whether what lies between the split products of a layer is split along
    the sequence (True) or whole on every rank of the tensor axis (False); None leaves it to the search.
    """

    dp_replicate: int = Field(default=1, ge=1)
    dp_shard: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)
    tp: int = Field(default=1, ge=1)
    sequence_parallel: bool | None = None
    ep: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    num_virtual_stages: int = Field(default=1, ge=1, description="stages per pipeline rank")
    zero_stage: Literal[0, 1, 2, 3] = 0
    microbatch_size: int = Field(default=1, ge=1, description="samples of one replica in one microbatch")
    num_microbatches: int = Field(default=1, ge=1)
    schedule: ScheduleName = "1F1B"
    recompute: Recompute = "none"
    offload: Offload = "none"
    axis_order: tuple[str, ...] = MESH_AXES

    @field_validator("axis_order")
    @classmethod
    def _names_every_axis(cls, order: tuple[str, ...]) -> tuple[str, ...]:
        if sorted(order) != sorted(MESH_AXES):
            raise ValueError(
                f"axis_order names every axis once, outermost first: {', '.join(MESH_AXES)} in some order; "
                f"got {', '.join(order) or 'none'}"
            )
        return order

    @property
    def dp(self) -> int:
        """Data-parallel replicas."""
        return self.dp_replicate * self.dp_shard

    @property
    def expert_axis(self) -> str | None:
        """The data axis among whose neighbours a program deals out the experts; None where `ep` does not
        divide it, so that it would have to be two."""
        axis, size = ("dp_shard", self.dp_shard) if self.dp_shard > 1 else ("dp_replicate", self.dp_replicate)
        return axis if size % self.ep == 0 else None

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def global_batch(self) -> int:
        return self.microbatch_size * self.num_microbatches * self.dp

    @property
    def mesh(self) -> Mapping[str, int]:
        """Axes of the device mesh with more than one rank, outermost first."""
        sizes = ((axis, getattr(self, axis)) for axis in self.axis_order)
        return {axis: size for axis, size in sizes if size > 1}

    def __str__(self) -> str:
        """A short name, such as `dp8 tp8 pp2 zero1 mb1x16 1F1B full-recompute`."""
        parts = [
            f"dp{self.dp}"
            if self.dp_replicate == 1 or self.dp_shard == 1
            else f"dp{self.dp_replicate}x{self.dp_shard}"
        ]
        parts += [
            f"{axis}{size}" for axis, size in (("cp", self.cp), ("tp", self.tp), ("ep", self.ep)) if size > 1
        ]
        if self.sequence_parallel is not None:
            parts.append("sp" if self.sequence_parallel else "no-sp")
        if self.pp > 1:
            virtual = f"x{self.num_virtual_stages}" if self.num_virtual_stages > 1 else ""
            parts.append(f"pp{self.pp}{virtual} {self.schedule}")
        if self.zero_stage:
            parts.append(f"zero{self.zero_stage}")
        parts.append(f"mb{self.microbatch_size}x{self.num_microbatches}")
        if self.recompute != "none":
            parts.append(f"{self.recompute}-recompute")
        if self.offload != "none":
            parts.append(f"{self.offload}-offload")
        axes = list(self.mesh)
        if axes != sorted(axes, key=MESH_AXES.index):
            parts.append(f"mesh({', '.join(axes)})")
        return " ".join(parts)


class ModelSummary(Frozen):
    """What was planned: enough to recognise the model again, and to print."""

    name: str
    fingerprint: str = Field(description="SHA-256 of the captured graph")
    num_parameters: int
    dtype: str
    input_shapes: Mapping[str, tuple[int, ...]] = Field(description="of one sample batch of size 1")
    tokens_per_sample: int
    num_ops: int
    flops_per_sample: float = Field(description="forward, by torch's FlopCounterMode")


class ClusterSummary(Frozen):
    """Where it runs."""

    id: str
    name: str
    device: str
    num_devices: int
    devices_per_node: int
    memory_bytes: float
    host_memory_bytes: float | None = Field(
        default=None, description="a device's part of its host's memory, where that is known"
    )
    peak_flops_per_s: float
    price_usd_per_device_hour: float | None = None


class StagePlan(Frozen):
    """One pipeline stage: the ops from `first_op` up to the next stage's, in the order of the graph."""

    index: int
    first_op: str
    modules: tuple[str, ...] = Field(description="the blocks and other modules it holds, ranges abbreviated")
    forward_s: float
    backward_s: float
    memory_bytes: Mapping[str, float] = Field(
        description="ledger at the peak: parameters, gradients, optimizer, ..."
    )
    pool: str | None = Field(default=None, description="the pool it runs on, where there are several")

    @property
    def peak_memory_bytes(self) -> float:
        return sum(self.memory_bytes.values())


class PoolPlan(Frozen):
    """One pool's part of a pipeline through several: the stages `[first_stage, first_stage + parallelism.pp)`
    on world ranks from `first_rank` on.

    `parallelism`, `rank_groups`, `strategies` and `placements` are as in `Plan`, for the pool by itself,
    whose ranks count from 0: no group but the pipeline's reaches out of it.
    """

    cluster: ClusterSummary
    collective_library: str = Field(description="through which the devices of the pool communicate")
    parallelism: Parallelism
    first_rank: int
    first_stage: int
    rank_groups: tuple[RankGroups, ...] = ()
    strategies: Mapping[str, Mapping[str, str]]
    placements: Mapping[str, str] = Field(default_factory=dict)


class Prediction(Frozen):
    """Predicted cost of one training step; `terms_s` add up to `step_s`."""

    software: str = Field(description="the era of software that runs it, see `costmodel.software`")
    step_s: float
    terms_s: Mapping[str, float]
    tokens_per_s: float
    model_flops_per_s_per_device: float
    mfu: float
    peak_memory_bytes: float
    host_memory_bytes: float = Field(default=0.0, description="offloaded states of the fullest device")
    single_device_step_s: float | None = Field(
        default=None, description="the same global batch on one device, were its memory unlimited"
    )


class Alternative(Frozen):
    """A runner-up: what it was, what it would cost, and why it lost."""

    label: str
    parallelism: Parallelism
    step_s: float | None
    peak_memory_bytes: float | None
    reason: str


class Recomputation(Frozen):
    """What the backward computes again of some blocks: all but the results of the ops `kept`, or, by one of
    the modes, as of all blocks."""

    blocks: tuple[str, ...] = Field(description="paths of the modules")
    mode: Literal["attention", "alternate", "selective", "full", "kept"]
    kept: tuple[str, ...] = Field(
        default=(),
        description="ops of the first of these blocks; `x__tp_1` is what moves `x` over the ranks of `tp`",
    )
    labels: tuple[str, ...] = Field(default=(), description="what people call the ops in `kept`")


class PinCost(Frozen):
    """What one of the user's pins costs: without it, all others kept, a step would take `step_s`."""

    pin: str
    step_s: float
    cost_s: float = Field(description="by how much a step takes longer for the pin")


class LayerEffort(Frozen):
    """What one layer of the search had to solve: how many problems, and the largest of them."""

    layer: str = Field(description="see `autopar.search.effort.Layer`")
    num_problems: int
    num_variables: int
    num_rows: int
    num_integer: int = Field(description="of the variables, those that must be whole")
    cpu_s: float | None = Field(
        default=None,
        exclude=True,
        description="processor time; left out of the JSON: it is not deterministic",
    )


class Certificate(Frozen):
    """How far the plan can be from the best one under this cost model, and what was looked at.

    No candidate takes less than `bound_s` with its mesh axes in the usual order (`MESH_AXES`). A plan whose
    axes gain from another order may take less than that; then `bound_s` is its own time.
    """

    status: Literal["optimal", "feasible", "evaluated"]
    objective_s: float
    bound_s: float
    num_candidates: int
    num_solved: int
    pruned: Mapping[str, int]
    layers: tuple[LayerEffort, ...] = ()
    solve_s: float | None = Field(
        default=None, exclude=True, description="left out of the JSON: it is not deterministic"
    )

    @property
    def gap(self) -> float:
        return 0.0 if self.objective_s == 0 else max(0.0, 1 - self.bound_s / self.objective_s)


class Plan(Frozen):
    """How to train one model on one cluster.

    `strategies` maps a mesh axis (`dp` stands for both data axes together) to the strategy key of every op,
    by the name of the op's representative: the same op of the first instance of its block. An op that does
    otherwise than that has a key by its own name. `placements` tells how every parameter lies on the tensor
    axis, `*` standing for the numbers of repeated blocks.
    `recomputation` lists every block that computes something again; the others keep all.
    `policy` is what the plan was priced with and its program trains by: optimizer, master copies, precision
    of gradients, loss scale. `low_precision` is priced only: programs have products in the model's own.

    Where devices are of several kinds, `pools` has the parts of the pipeline in their order, each with what
    it runs; `parallelism` then is that of the first, with all pipeline stages.
    """

    version: Literal[4] = PLAN_VERSION
    model: ModelSummary
    cluster: ClusterSummary
    parallelism: Parallelism
    policy: OptimizerPolicy = Field(description="what training keeps of each parameter, in bytes")
    low_precision: str | None = Field(
        default=None, description="what products with parameters of blocks were priced in, such as fp8"
    )
    rank_groups: tuple[RankGroups, ...] = Field(default=(), description="who communicates along each axis")
    strategies: Mapping[str, Mapping[str, str]]
    placements: Mapping[str, str] = Field(default_factory=dict)
    stages: tuple[StagePlan, ...]
    pools: tuple[PoolPlan, ...] = ()
    recomputation: tuple[Recomputation, ...] = ()
    prediction: Prediction
    certificate: Certificate
    alternatives: tuple[Alternative, ...] = ()
    pin_costs: tuple[PinCost, ...] = ()
    warnings: tuple[str, ...] = ()

    @field_validator("version", mode="before")
    @classmethod
    def _is_of_this_version(cls, version: object) -> object:
        if version != PLAN_VERSION:
            raise ValueError(
                f"the plan is of version {version}, this autopar reads {PLAN_VERSION}; plan the model again"
            )
        return version

    @property
    def fits(self) -> bool:
        """Whether devices and their hosts have the memory for it."""
        used, cluster = self.prediction, self.cluster
        fits_host = cluster.host_memory_bytes is None or used.host_memory_bytes <= cluster.host_memory_bytes
        return used.peak_memory_bytes <= cluster.memory_bytes and fits_host

    def to_json(self) -> str:
        """The plan as indented JSON, the same bytes for the same plan."""
        return self.model_dump_json(indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote. Raises pydantic's ValidationError, a ValueError, where it is
        none."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))

    def explain(self, token_budget: float | None = None, format: Literal["text", "json"] = "text") -> str:
        """Why this plan: verdict, mesh, stages, placements, costs by term, and the runners-up.

        With `token_budget`, the number of tokens to train on, it also tells how long that takes.
        """
        from autopar.report import explain  # the report reads plans, not the other way round

        return explain(self, token_budget, format)
