"""What to measure on which kind of device: sizes that training has and that take milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final, NamedTuple

KIB, MIB = 2**10, 2**20


class Product(NamedTuple):
    """The product `[m, k] @ [k, n]`."""

    m: int
    n: int
    k: int


class Attention(NamedTuple):
    """Attention over `[batch, heads, seq, head_dim]`."""

    batch: int
    heads: int
    seq: int
    head_dim: int
    causal: bool


@dataclass(frozen=True)
class Sizes:
    """Sizes by importance: the first of each is always measured, the rest as far as time allows.

    `limit_s` bounds one measurement; `message_bytes` are payloads of collectives.
    """

    limit_s: float
    products: tuple[Product, ...]
    memory_bytes: tuple[int, ...]
    attentions: tuple[Attention, ...]
    message_bytes: tuple[int, ...]

    def quick(self) -> Sizes:
        """The first of each alone; of the messages the two that a line needs."""
        return Sizes(
            self.limit_s / 3,
            self.products[:1],
            self.memory_bytes[:1],
            self.attentions[:1],
            self.message_bytes[:2],
        )


def _products(m: tuple[int, ...], nk: tuple[int, ...]) -> tuple[Product, ...]:
    """All combinations, the largest first: those take most of a step."""
    shapes = {Product(*shape) for shape in product(m, nk, nk)}
    return tuple(sorted(shapes, key=lambda s: (-s.m * s.n * s.k, s)))


def _attentions(heads: int, sequences: tuple[int, ...], head_dims: tuple[int, ...]) -> tuple[Attention, ...]:
    """Batches of about the same number of tokens; causal ones and the longest sequence first."""
    longest = max(sequences)
    return tuple(
        Attention(longest // seq, heads, seq, head_dim, causal)
        for causal, seq, head_dim in product((True, False), sequences, head_dims)
    )


SIZES: Final[Mapping[str, Sizes]] = {
    "cuda": Sizes(
        limit_s=0.3,
        products=_products((128, 512, 2048, 8192), (512, 2048, 8192)),
        memory_bytes=(768 * MIB, 192 * MIB, 48 * MIB, 12 * MIB, 3 * MIB),
        attentions=_attentions(16, (8192, 4096, 2048, 1024), (128, 64)),
        message_bytes=(256 * MIB, 64 * KIB, 1 * MIB, 16 * MIB, 64 * MIB, 4 * MIB, 256 * KIB, 1024 * MIB),
    ),
    "cpu": Sizes(
        limit_s=0.3,
        products=_products((64, 256, 1024), (64, 256, 1024)),
        memory_bytes=(192 * MIB, 48 * MIB, 12 * MIB, 3 * MIB),
        attentions=_attentions(8, (1024, 256), (64,)),
        message_bytes=(4 * MIB, 64 * KIB, 1 * MIB, 16 * MIB, 4 * KIB, 256 * KIB),
    ),
}
"""By device type of torch."""
