"""Time of a collective: alpha-beta models of the algorithms that could run it, the fastest of which counts.

Every algorithm is a line, time(S) = latency + S · s_per_byte, over the spans of the group (`topology.spans`).
At a span, k units of g members each meet with latency a per message and B bytes/s per member; on a torus a
ring takes fewer than the k - 1 steps written here. n is the size of the group:

    all_gather, reduce_scatter   hierarchical    Σ (k-1) a      +  S Σ (k-1)/k / (g B)
                                 flat ring       Σ (k-1) u a    +  S (n-1)/n / min (g B)
    all_reduce                   both of these, twice: reduce_scatter, then all_gather
                                 tree            Σ 2 d a        +  S 2 / (w min (g B))
                                 in network      r              +  S max 1 / (g R)
    broadcast, reduce            pipelined       Σ (k-1) u a    +  S / min (g B)
    all_to_all                   pairwise        Σ m a          +  S max (k-1) g h / (n B)
    scatter, gather              direct          Σ m a          +  S max (k-1) g / (n B)
    send_recv                    direct          max a          +  S / min B

`g B`, because a unit of g members leaves through g shares of the level's bandwidth. `u` is how many units of
that kind a flat ring passes one after the other (1 where the library goes level by level); `d` how deep a
tree is, ⌈log2 k⌉, or k - 1 where the library makes a chain of devices, and `w` the share of the bandwidth
that it reaches; `h` how many links a message to a random peer crosses; `m` the rounds of messages, (k-1) g of
them with so many at once as the library keeps under way. The levels of an all_to_all work in parallel;
send_recv is between the worst neighbours of the group.

Hierarchical algorithms run where the library has them (`Level.level_by_level`). Switches that reduce do so in
one pass of R bytes/s per member, r later; levels inside that do not add a reduce_scatter and an all_gather.
On rails an all_to_all changes rails inside the node first, so the inner levels also carry what leaves, and
one message to each node carries all that is for it (NCCL's PXN).

Each line starts `Level.start_s` late, and comes again in every protocol that all its levels have, with that
protocol's times and at its share of the bandwidth: so bus bandwidth rises with the payload as it does in
reality. A table measured on just this placement replaces the lines; smaller groups on the same level, and the
halves of an all_reduce, take the table's ratio to its own lines, payload by payload.

Sources: nccl-tests doc/PERFORMANCE.md (ring terms), NCCL src/graph/tuning.cc (latencies, chains and trees,
protocols; the flat ring with them follows SimAI's ratio table from 2 to 128 nodes), the network chapter of
"Machine Learning Engineering" (S. Bekman; hierarchical and multi-channel flat ring, against 22 ms measured
for 4 GiB on 32 B200; NVLink SHARP), "How to Scale Your Model" (tori, all_to_all).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, log2
from typing import TYPE_CHECKING, Final, NamedTuple

from costmodel.curves import Algorithm, MeasuredAlgorithm, corrected, lower_envelope
from costmodel.topology import Span, spans
from costmodel.work import Collective, CollectiveKind, Group

if TYPE_CHECKING:
    from hardware_db import Cluster

Spans = tuple[Span, ...]
_RINGS: Final = ("all_reduce", "all_gather", "reduce_scatter")


class _Pace(NamedTuple):
    """How messages travel: a start, seconds per step at each span, and a share of the bandwidth."""

    suffix: str
    start_s: float
    step_s: tuple[float, ...]
    bandwidth_share: float

    def line(self, name: str, latency_s: float, s_per_byte: float) -> Algorithm:
        return Algorithm(name + self.suffix, self.start_s + latency_s, s_per_byte / self.bandwidth_share)


def collective_time_s(collective: Collective, cluster: Cluster) -> float:
    """Seconds of `collective` on `cluster` by its fastest algorithm; nothing to move, or nobody to move it
    to, is 0.

    Raises CostModelError when the group does not fit the cluster.
    """
    if not collective.num_bytes:
        return 0.0
    candidates = algorithms(collective.kind, collective.group, cluster, alone=collective.alone)
    return min((a.time_s(collective.num_bytes) for a in candidates), default=0.0)


def algorithms(
    kind: CollectiveKind, group: Group, cluster: Cluster, *, alone: bool = False
) -> tuple[Algorithm, ...]:
    """The algorithms that can run `kind` over `group`, those that are never the fastest left out: none for a
    group of one, a table alone where one was measured.

    They depend on no payload: a planner that prices many payloads over one group can keep them. `alone` is
    whether no other group of the axis communicates meanwhile. Raises CostModelError when the group does not
    fit the cluster.
    """
    parts = spans(group, cluster, alone=alone)
    if not parts:
        return ()
    shape = tuple(p.num_peers for p in parts)
    tables = parts[-1].level.measured
    for table in tables:
        if (table.kind, table.shape) == (kind, shape):
            return (MeasuredAlgorithm.of(table),)
    lines = lower_envelope(_lines(kind, parts, group.size))
    for table in tables:
        if table.kind == "all_reduce" and kind in _RINGS and len(table.shape) == len(shape) == 1:
            whole = Group(table.shape[0])
            own_lines = lower_envelope(_lines("all_reduce", spans(whole, cluster), whole.size))
            return (corrected(lines, table, own_lines),)
    return lines


def _lines(kind: CollectiveKind, parts: Spans, size: int) -> Iterator[Algorithm]:
    plain, *quick = _paces(parts)
    match kind:
        case "all_to_all":
            yield _all_to_all(parts, plain, size)
        case "scatter" | "gather":
            yield _from_root(parts, plain, size)
        case "send_recv":
            yield _send_recv(parts, plain)
        case "broadcast" | "reduce":
            yield from (_pipelined(parts, pace, size) for pace in (plain, *quick))
        case "all_gather" | "reduce_scatter":
            yield from _rings(parts, (plain, *quick), size, 1)
        case "all_reduce":
            yield from _rings(parts, (plain, *quick), size, 2)
            yield from (_tree(parts, pace) for pace in (plain, *quick))
            if _reduces(parts[-1]):
                yield _in_network(parts, plain)


def _paces(parts: Spans) -> Iterator[_Pace]:
    """The levels' own times, then those of every protocol that all of them have."""
    yield _Pace("", max(p.level.start_s for p in parts), tuple(p.latency_s for p in parts), 1.0)
    by_name = [{protocol.name: protocol for protocol in p.level.protocols} for p in parts]
    for name in by_name[0]:
        if all(name in protocols for protocols in by_name):
            same = [protocols[name] for protocols in by_name]
            yield _Pace(
                f", {name}",
                max(p.start_s for p in same),
                tuple(p.step_s for p in same),
                min(p.bandwidth_share for p in same),
            )


def _rings(parts: Spans, paces: tuple[_Pace, ...], size: int, num_passes: int) -> Iterator[Algorithm]:
    for pace in paces:
        yield _flat_ring(parts, pace, size, num_passes)
        if _goes_level_by_level(parts):
            yield _hierarchical(parts, pace, num_passes)


def _goes_level_by_level(parts: Spans) -> bool:
    return all(p.level.level_by_level for p in parts[:-1])


def _hierarchical(parts: Spans, pace: _Pace, num_passes: int) -> Algorithm:
    s_per_byte = sum((p.num_peers - 1) / p.num_peers / p.unit_bytes_per_s for p in parts)
    latency_s = sum(p.num_steps * step_s for p, step_s in zip(parts, pace.step_s, strict=True))
    return pace.line("hierarchical ring", num_passes * latency_s, num_passes * s_per_byte)


def _flat_ring(parts: Spans, pace: _Pace, size: int, num_passes: int) -> Algorithm:
    bytes_per_s = min(p.unit_bytes_per_s for p in parts)
    latency_s = _flat_ring_latency_s(parts, pace, size)
    return pace.line("flat ring", num_passes * latency_s, num_passes * (size - 1) / size / bytes_per_s)


def _flat_ring_latency_s(parts: Spans, pace: _Pace, size: int) -> float:
    return sum(
        size // (p.num_peers * p.num_inside) * p.num_steps * step_s
        for p, step_s in zip(parts, pace.step_s, strict=True)
    )


def _tree(parts: Spans, pace: _Pace) -> Algorithm:
    depths = (p.num_peers - 1 if _is_chain(p) else ceil(log2(p.num_peers)) for p in parts)
    latency_s = sum(2 * depth * step_s for depth, step_s in zip(depths, pace.step_s, strict=True))
    bytes_per_s = min(p.level.tree_bandwidth_share * p.unit_bytes_per_s for p in parts)
    return pace.line("tree", latency_s, 2 / bytes_per_s)


def _is_chain(part: Span) -> bool:
    """NCCL's trees branch from node to node only."""
    return not part.level.level_by_level and part.level.topology not in ("fat_tree", "rails", "dragonfly")


def _reduces(part: Span) -> bool:
    reduction = part.level.reduction
    return reduction is not None and part.num_peers >= reduction.min_peers


def _in_network(parts: Spans, pace: _Pace) -> Algorithm:
    """The outermost level reduces; so may inner ones, in the same pass."""
    rings_s, rings_s_per_byte, passes_s, starts_s = 0.0, 0.0, 0.0, 0.0
    for p, step_s in zip(parts, pace.step_s, strict=True):
        if _reduces(p) and (reduction := p.level.reduction) is not None:
            passes_s = max(passes_s, 1 / (p.num_inside * reduction.all_reduce_bytes_per_s))
            starts_s = max(starts_s, reduction.start_s)
        else:
            rings_s += 2 * p.num_steps * step_s
            rings_s_per_byte += 2 * (p.num_peers - 1) / p.num_peers / p.unit_bytes_per_s
    return Algorithm("in network", starts_s + rings_s, passes_s + rings_s_per_byte)


def _pipelined(parts: Spans, pace: _Pace, size: int) -> Algorithm:
    if _goes_level_by_level(parts):
        latency_s = sum(p.num_steps * step_s for p, step_s in zip(parts, pace.step_s, strict=True))
    else:
        latency_s = _flat_ring_latency_s(parts, pace, size)
    return pace.line("pipelined ring", latency_s, 1 / min(p.unit_bytes_per_s for p in parts))


def _all_to_all(parts: Spans, pace: _Pace, size: int) -> Algorithm:
    s_per_byte = max(
        ((p.num_peers - 1) * p.num_inside / size + _rail_changes(parts, p, size))
        * p.mean_hops
        / p.bandwidth_bytes_per_s
        for p in parts
    )
    return pace.line("pairwise", _messages_s(parts, pace), s_per_byte)


def _rail_changes(parts: Spans, inner: Span, size: int) -> float:
    """The share of what a rank holds that passes `inner` on its way to the rail of a card in another node."""
    rails = next((p for p in parts if p.level.topology == "rails"), None)
    if rails is None or inner.num_inside >= rails.num_inside:
        return 0.0
    leaving = (size - rails.num_inside) / size
    return leaving * (inner.num_peers - 1) * inner.num_inside / rails.num_inside


def _from_root(parts: Spans, pace: _Pace, size: int) -> Algorithm:
    s_per_byte = max((p.num_peers - 1) * p.num_inside / size / p.bandwidth_bytes_per_s for p in parts)
    return pace.line("direct", _messages_s(parts, pace), s_per_byte)


def _messages_s(parts: Spans, pace: _Pace) -> float:
    return sum(
        ceil(
            (p.num_peers - 1)
            * (1 if p.level.topology == "rails" else p.num_inside)
            / p.level.concurrent_messages
        )
        * step_s
        for p, step_s in zip(parts, pace.step_s, strict=True)
    )


def _send_recv(parts: Spans, pace: _Pace) -> Algorithm:
    bytes_per_s = min(p.pair_bandwidth_bytes_per_s for p in parts)
    return pace.line("direct", max(pace.step_s), 1 / bytes_per_s)
