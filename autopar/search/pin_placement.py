"""One pinned placement: how the parameters of a module lie on a mesh axis, or how they may not."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autopar.errors import PinConflictError
from autopar.placements import Placement, Replicate, Shard
from autopar.search.module_patterns import covers

PINNED_AXES = ("tp",)
"""The axes on which placements are searched, so can be pinned."""

_SHARD = re.compile(r"(?:Shard|S)\((\d+)\)")
_KEY = re.compile(r"(?!shard)[a-z][\w:,|]*")


@dataclass(frozen=True)
class PinnedPlacement:
    """A pattern of modules or parameters, and what their placement on `axis` must be, or must not.

    `placement` is None where `key` names a strategy instead: then the ops that read the parameters use it,
    and all ops of a module that has none.
    """

    pattern: str
    axis: str
    text: str
    is_forbidden: bool
    placement: Shard | Replicate | None
    key: str

    @staticmethod
    def parse(pattern: str, axis: str, text: str) -> PinnedPlacement:
        """Read `Shard(0)`, `Replicate`, a strategy key, or `!` and one of them. Also takes `S(0)` and `R`, as
        reports write them. Raises PinConflictError."""
        body = text.removeprefix("!").strip()
        shard = _SHARD.fullmatch(body)
        placement: Shard | Replicate | None = None
        if shard is not None:
            placement = Shard(int(shard[1]))
        elif body in ("Replicate", "R"):
            placement = Replicate()
        elif not _KEY.fullmatch(body):
            raise PinConflictError(
                f"{pattern}:{axis}={text} is no placement; write Shard(0), Shard(1), Replicate, "
                "or the key of a strategy such as o; a ! before it forbids it"
            )
        return PinnedPlacement(pattern, axis, text, body != text, placement, body)

    def covers(self, *names: str) -> bool:
        """Whether the pattern covers one of the names of a parameter, or a module's path."""
        return any(covers(self.pattern, name) for name in names)

    def holds_for(self, value: Placement) -> bool:
        """Whether a parameter may lie like this."""
        if isinstance(self.placement, Shard):
            is_so = isinstance(value, Shard) and value.dim == self.placement.dim
        else:
            is_so = isinstance(value, Replicate)
        return is_so is not self.is_forbidden

    def holds_for_key(self, key: str) -> bool:
        """Whether an op may use this strategy; `o` means `o` however its dimension is cut into sections."""
        return (self.key in (key, key.partition("|")[0])) is not self.is_forbidden

    def __str__(self) -> str:
        return f"{self.pattern}:{self.axis}={self.text}"
