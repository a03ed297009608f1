"""How one tensor lies on one mesh axis, forward and backward.

The state of a tensor on an axis is a pair: how its value lies on the ranks, and how its gradient does. Four
kinds of pair are enough to express data, tensor, sequence, context and expert parallelism, and keeping the
two halves together is what makes plain autograd over local shards correct: every change of state is a
collective forward and the conjugate one backward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class Shard:
    """Each rank holds an equal slice of dimension `dim`.

    With `sections` the dimension is a concatenation of parts of these sizes (a fused q, k, v projection) and
    each rank holds its slice of every part, concatenated. In `zigzag` the dimension, or each part, is cut
    into two slices for every rank, and rank i of n holds the i-th from the front and the i-th from the back:
    positions under a causal mask, of which the later ones have more to do. With `own` each rank has put the
    rows of its slice into an order of its own (`graphs.routing`): there is no whole to gather.
    """

    dim: int
    sections: tuple[int, ...] | None = None
    zigzag: bool = False
    own: bool = False

    def __str__(self) -> str:
        parts = "" if self.sections is None else f", {len(self.sections)} sections"
        order = ", zigzag" if self.zigzag else ", own order" if self.own else ""
        return f"S({self.dim}{parts}{order})"


@dataclass(frozen=True, slots=True)
class Own:
    """Every rank has a value of its own, of the rows that it has: how many there are of a kind. `parts` tells
    into how many sections these rows were cut before they were dealt out; None for one slice."""

    parts: int | None = None

    def __str__(self) -> str:
        return "own"


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank holds the whole value."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank holds a term; the value is their sum."""

    def __str__(self) -> str:
        return "P"


Placement = Shard | Replicate | Partial | Own


@dataclass(frozen=True, slots=True)
class State:
    """A tensor on one mesh axis: placement of its value and of its gradient.

    The search keeps many things by state, so its hash is worked out once.
    """

    value: Placement
    grad: Placement
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.value, self.grad)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"{self.value}" if isinstance(self.value, Shard) else f"{self.value}/{self.grad}"


RR = State(Replicate(), Replicate())
RP = State(Replicate(), Partial())
PR = State(Partial(), Replicate())


@lru_cache(maxsize=4096)
def sharded(dim: int, sections: tuple[int, ...] | None = None, *, zigzag: bool = False) -> State:
    """The state of a tensor split along `dim`: value and gradient lie alike."""
    return State(Shard(dim, sections, zigzag), Shard(dim, sections, zigzag))
