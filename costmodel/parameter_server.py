"""Parameter servers as an alternative to all_reduce: workers push gradients to servers and pull parameters.

w workers of Bw bytes/s meet p servers of Bs bytes/s, which hold a p-th of S bytes each; rates are one way,
and links carry both ways at once. A worker moves S each way, a server w S / p:

    synchronous     2 a + S max(1 / Bw, w / (p Bs))          pieces are pushed while earlier ones are pulled
                    2 a + 2 S max(1 / Bw, w / (p Bs))        pushes, then pulls
    asynchronous    min(w / (c + 2 a + 2 S / Bw), p Bs / S)  updates/s of workers that compute for c seconds

So p = w servers as fast as the workers take S / B, half of a ring's 2 (w-1)/w S / B, and fewer than about w/2
take longer than the ring. On the workers' own machines a server's load adds to its worker's; with k <= n
spare machines beside n workers, all of B bytes/s, shares that load every card alike take (BytePS, Jiang et
al., OSDI 2020, section 4)

    spread          2 a + S/B 2 n (n-1) / (n² + k n - 2 k)

which is the ring for k = 0 (optimal without spare machines: Patarasu and Yuan, 2009) and S / B for k = n.

Without a barrier nobody waits for the slowest worker, but a gradient is applied to parameters that the others
have meanwhile updated w - 1 times on average (Abadi et al., OSDI 2016): more steps are needed, which is not
priced here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from costmodel.collectives import collective_time_s
from costmodel.errors import CostModelError
from costmodel.topology import spans
from costmodel.work import Collective, Group

if TYPE_CHECKING:
    from hardware_db import Cluster


@dataclass(frozen=True, slots=True)
class ParameterServers:
    """`num_workers` and the servers that they push to and pull from, on machines of their own.

    Rates are of one worker and of one server, one direction; `latency_s` is that of a message. Raises
    CostModelError unless there is someone on both sides and something to send with.
    """

    num_workers: int
    num_servers: int
    worker_bytes_per_s: float
    server_bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.num_workers, self.num_servers) < 1:
            raise CostModelError(
                f"parameter servers need a worker and a server: got {self.num_workers} and {self.num_servers}"
            )
        if min(self.worker_bytes_per_s, self.server_bytes_per_s) <= 0 or self.latency_s < 0:
            raise CostModelError(
                "parameter servers need rates above 0 and a latency from 0: got "
                f"{self.worker_bytes_per_s:g} and {self.server_bytes_per_s:g} bytes/s, {self.latency_s:g} s"
            )

    @property
    def mean_staleness(self) -> int:
        """Updates that others make between a worker's pull and its push when nobody waits."""
        return self.num_workers - 1

    def synchronous_s(self, num_bytes: float, *, pipelined: bool = True) -> float:
        """Seconds until every worker has pushed gradients of `num_bytes` and pulled as many parameters.

        `pipelined` is whether the tensors are cut in pieces, so that pushing and pulling overlap.
        """
        worker_s = num_bytes / self.worker_bytes_per_s
        server_s = num_bytes * self.num_workers / (self.num_servers * self.server_bytes_per_s)
        return 2 * self.latency_s + (1 if pipelined else 2) * max(worker_s, server_s)

    def asynchronous_updates_per_s(self, num_bytes: float, compute_s: float) -> float:
        """Gradients that the servers apply per second, over all workers, each of which computes one in
        `compute_s`; infinite when nothing takes any time."""
        worker_s = compute_s + 2 * self.latency_s + 2 * num_bytes / self.worker_bytes_per_s
        per_update_s = max(
            worker_s / self.num_workers, num_bytes / (self.num_servers * self.server_bytes_per_s)
        )
        return 1 / per_update_s if per_update_s else float("inf")


def spread_servers_s(
    num_bytes: float, num_workers: int, num_spare: int, bytes_per_s: float, latency_s: float = 0.0
) -> float:
    """Seconds of a synchronous exchange with servers on all `num_workers` machines and on `num_spare` others.

    More spare machines than workers are of no further use. Raises CostModelError without a worker.
    """
    if num_workers < 1 or num_spare < 0:
        raise CostModelError(
            f"servers cannot be spread over {num_workers} worker machines and {num_spare} spare ones"
        )
    if num_workers == 1:
        return 0.0
    n, k = num_workers, min(num_spare, num_workers)
    return 2 * latency_s + num_bytes / bytes_per_s * 2 * n * (n - 1) / (n * n + k * n - 2 * k)


@dataclass(frozen=True, slots=True)
class GradientExchange:
    """Seconds of one exchange of gradients: by all_reduce, and by parameter servers (inside the nodes first,
    which is `inside_s` of it)."""

    all_reduce_s: float
    parameter_server_s: float
    inside_s: float

    @property
    def speedup(self) -> float:
        """By how much parameter servers are faster than all_reduce; below 1 they are slower."""
        return self.all_reduce_s / self.parameter_server_s


def gradient_exchange(
    num_bytes: float,
    group: Group,
    cluster: Cluster,
    num_servers: int,
    *,
    server_bytes_per_s: float | None = None,
) -> GradientExchange:
    """Both ways to exchange gradients of `num_bytes` over a data-parallel `group`.

    Members that lie inside one unit of the outermost level reduce among themselves and push as one worker,
    each its part. A server moves `server_bytes_per_s`, by default what a unit moves. Raises CostModelError
    for a group of one and for one that does not fit.
    """
    parts = spans(group, cluster)
    if not parts:
        raise CostModelError("a group of one rank has no gradients to exchange; give a group of two or more")
    outer = parts[-1]
    servers = ParameterServers(
        num_workers=outer.num_peers,
        num_servers=num_servers,
        worker_bytes_per_s=outer.unit_bytes_per_s,
        server_bytes_per_s=outer.unit_bytes_per_s if server_bytes_per_s is None else server_bytes_per_s,
        latency_s=outer.latency_s,
    )
    inner = Group(outer.num_inside, group.stride)
    inside_s = sum(
        collective_time_s(Collective(kind, num_bytes, inner), cluster)
        for kind in ("reduce_scatter", "all_gather")
    )
    return GradientExchange(
        all_reduce_s=collective_time_s(Collective("all_reduce", num_bytes, group), cluster),
        parameter_server_s=inside_s + servers.synchronous_s(num_bytes),
        inside_s=inside_s,
    )
