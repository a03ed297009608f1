"""Every error that autopar raises for something the user can change.

    ValueError
    ├── AutoparError
    │   ├── InvalidParallelismError   degrees that do not fit the devices, the batch or the model
    │   │   └── PinConflictError      pinned settings that exclude each other
    │   ├── InfeasibleError           no plan fits: which limit binds, by how much, what would help
    │   ├── SearchTimeoutError        the time limit passed before there was any plan
    │   └── RewriteError              a plan that cannot be written as a program
    ├── graphs.errors.GraphError      the model cannot be captured
    ├── hardware_db.errors.HardwareError   the cluster is unknown or ill described
    └── costmodel.errors.CostModelError    a request that has no price

Each message gives the numbers, the culprit and the next step.
"""

from __future__ import annotations

__all__ = [
    "AutoparError",
    "InfeasibleError",
    "InvalidParallelismError",
    "PinConflictError",
    "RewriteError",
    "SearchTimeoutError",
]


class AutoparError(ValueError):
    """Base of autopar's own errors."""


class InvalidParallelismError(AutoparError):
    """The parallelism asked for does not fit the devices, the batch or the model."""


class PinConflictError(InvalidParallelismError):
    """The pinned settings leave nothing to search."""


class InfeasibleError(AutoparError):
    """No plan fits the cluster.

    Attributes:
        limit: the largest term of the memory ledger of the best candidate.
        excess_bytes: by how much that candidate exceeds one device's memory.
        relaxations: changes that were tried and do help, smallest first.
    """

    def __init__(
        self, message: str, *, limit: str = "", excess_bytes: float = 0.0, relaxations: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.limit = limit
        self.excess_bytes = excess_bytes
        self.relaxations = relaxations


class SearchTimeoutError(AutoparError):
    """The time limit passed before the search had any plan."""


class RewriteError(AutoparError):
    """The plan cannot be written as a program."""
