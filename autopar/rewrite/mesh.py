"""The device mesh of a program, and what its axes are called."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.errors import RewriteError
from autopar.plan import Parallelism
from autopar.runtime.mesh import joint


@dataclass(frozen=True)
class ProgramMesh:
    """Axes of more than one rank with their sizes, outermost first: those of the plan, but that the ranks
    which share experts are an axis of their own, the inner part of a data axis."""

    axes: dict[str, int]
    zero_stage: int

    @staticmethod
    def of(parallelism: Parallelism) -> ProgramMesh:
        """The mesh of a plan. Raises RewriteError where experts are dealt out over two data axes."""
        axes, ep = dict(parallelism.mesh), parallelism.ep
        if ep == 1:
            return ProgramMesh(axes, parallelism.zero_stage)
        holder = parallelism.expert_axis
        if holder is None:
            raise RewriteError(
                f"ep={ep} does not divide dp_shard={parallelism.dp_shard}: experts are dealt out within "
                "one data axis; use an ep that divides it, or a larger dp_shard"
            )
        size = axes[holder]
        # Under ZeRO the shards of experts are those of the rest of the axis, even where that is one rank.
        keeps = size > ep or parallelism.zero_stage > 0
        inner = {holder: size // ep, "ep": ep} if keeps else {"ep": ep}
        parts = [inner if axis == holder else {axis: size} for axis, size in axes.items()]
        found = {axis: size for part in parts for axis, size in part.items()}
        return ProgramMesh(found, parallelism.zero_stage)

    def joint(self, name: str) -> str | None:
        """The axis that stands for one of `autopar_runtime.JOINT`; None where no rank is along it."""
        return joint(self.axes, name)

    @property
    def expert_gradients(self) -> str | None:
        """The axis over which gradients of experts are summed apart from all others: ranks that hold the same
        ones. None where there are none, or where `fully_shard` does it."""
        return self.joint("expert_dp") if "ep" in self.axes and not self.zero_stage else None
