"""Time of a collective: alpha-beta models of the algorithms that could run it, the fastest of which counts.

Every algorithm is a line, time(S) = latency + S · s_per_byte, over the spans of the group (`topology.spans`).
At a span, k units of g members each meet with latency a per message and B bytes/s per member; on a torus a
ring takes fewer than the k - 1 steps written here. n is the size of the group:

    all_gather, reduce_scatter   hierarchical    Σ (k-1) a      +  S Σ (k-1)/k / (g B)
                                 flat ring       Σ (k-1) u a    +  S (n-1)/n / min (g B)
    all_reduce                   both of these, twice: reduce_scatter, then all_gather
                                 tree            Σ 2 ⌈log2 k⌉ a  +  S Σ 2 / (g B)
    broadcast                    pipelined       Σ (k-1) a      +  S / min (g B)
    all_to_all                   pairwise        Σ (k-1) g a    +  S max (k-1) g h / (n B)
    send_recv                    direct          max a          +  S / min B

`g B`, because a unit of g members leaves through g shares of the level's bandwidth. `u` is how many units of
that kind the flat ring passes one after the other; `h` how many links a message to a random peer crosses. The
levels of an all_to_all work in parallel; send_recv is between the worst neighbours of the group. Sources:
nccl-tests doc/PERFORMANCE.md (ring terms), NCCL src/graph/tuning.cc (tree latency), the network chapter of
"Machine Learning Engineering" (S. Bekman; hierarchical and multi-channel flat ring, against 22 ms measured
for 4 GiB on 32 B200), "How to Scale Your Model" (tori, all_to_all).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import TYPE_CHECKING

from costmodel.topology import Span, spans
from costmodel.work import Collective, CollectiveKind, Group

if TYPE_CHECKING:
    from hardware_db import Cluster


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to run a collective: seconds = latency_s + num_bytes · s_per_byte."""

    name: str
    latency_s: float
    s_per_byte: float

    def time_s(self, num_bytes: float) -> float:
        """Seconds for a payload of `num_bytes`, counted as `Collective` counts it."""
        return self.latency_s + num_bytes * self.s_per_byte


def collective_time_s(collective: Collective, cluster: Cluster) -> float:
    """Seconds of `collective` on `cluster` by its fastest algorithm; nothing to move, or nobody to move it
    to, is 0.

    Raises CostModelError when the group does not fit the cluster.
    """
    if not collective.num_bytes:
        return 0.0
    candidates = algorithms(collective.kind, collective.group, cluster)
    return min((a.time_s(collective.num_bytes) for a in candidates), default=0.0)


def algorithms(kind: CollectiveKind, group: Group, cluster: Cluster) -> tuple[Algorithm, ...]:
    """The algorithms that can run `kind` over `group`: none for a group of one.

    They depend on no payload: a planner that prices many payloads over one group can keep them.
    Raises CostModelError when the group does not fit the cluster.
    """
    parts = spans(group, cluster)
    if not parts:
        return ()
    match kind:
        case "all_gather" | "reduce_scatter":
            return _undominated(_hierarchical(parts, 1), _flat_ring(parts, group.size, 1))
        case "all_reduce":
            rings = _hierarchical(parts, 2), _flat_ring(parts, group.size, 2)
            return _undominated(*rings, _tree(parts))
        case "broadcast":
            return (_broadcast(parts),)
        case "all_to_all":
            return (_all_to_all(parts, group.size),)
        case "send_recv":
            return (_send_recv(parts),)


def _undominated(*candidates: Algorithm) -> tuple[Algorithm, ...]:
    """Those that are fastest for some payload, by rising latency: a planner evaluates fewer lines."""
    kept: list[Algorithm] = []
    for line in sorted(candidates, key=lambda c: (c.latency_s, c.s_per_byte)):
        if not kept or line.s_per_byte < kept[-1].s_per_byte:
            kept.append(line)
    return tuple(kept)


def _hierarchical(parts: tuple[Span, ...], num_passes: int) -> Algorithm:
    s_per_byte = sum((p.num_peers - 1) / p.num_peers / p.unit_bytes_per_s for p in parts)
    return Algorithm("hierarchical ring", num_passes * _ring_latency_s(parts), num_passes * s_per_byte)


def _tree(parts: tuple[Span, ...]) -> Algorithm:
    latency_s = sum(2 * ceil(log2(p.num_peers)) * p.latency_s for p in parts)
    return Algorithm("tree", latency_s, sum(2 / p.unit_bytes_per_s for p in parts))


def _flat_ring(parts: tuple[Span, ...], size: int, num_passes: int) -> Algorithm:
    latency_s = sum(size // (p.num_peers * p.num_inside) * p.num_steps * p.latency_s for p in parts)
    bytes_per_s = min(p.unit_bytes_per_s for p in parts)
    return Algorithm("flat ring", num_passes * latency_s, num_passes * (size - 1) / size / bytes_per_s)


def _broadcast(parts: tuple[Span, ...]) -> Algorithm:
    return Algorithm("pipelined ring", _ring_latency_s(parts), 1 / min(p.unit_bytes_per_s for p in parts))


def _all_to_all(parts: tuple[Span, ...], size: int) -> Algorithm:
    latency_s = sum((p.num_peers - 1) * p.num_inside * p.latency_s for p in parts)
    s_per_byte = max(
        (p.num_peers - 1) * p.num_inside / size * p.mean_hops / p.bandwidth_bytes_per_s for p in parts
    )
    return Algorithm("pairwise", latency_s, s_per_byte)


def _send_recv(parts: tuple[Span, ...]) -> Algorithm:
    bytes_per_s = min(p.pair_bandwidth_bytes_per_s for p in parts)
    return Algorithm("direct", max(p.latency_s for p in parts), 1 / bytes_per_s)


def _ring_latency_s(parts: tuple[Span, ...]) -> float:
    return sum(p.num_steps * p.latency_s for p in parts)
