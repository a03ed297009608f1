from __future__ import annotations

import pytest

from costmodel import (
    Collective,
    CostModelError,
    Group,
    ParameterServers,
    collective_time_s,
    gradient_exchange,
    spread_servers_s,
)
from hardware_db import Cluster

GB = 1e9
RATE = 10e9


def ring_s(num_ranks: int) -> float:
    return 2 * (num_ranks - 1) / num_ranks * GB / RATE


def servers(num_workers: int, num_servers: int, server_bytes_per_s: float = RATE) -> ParameterServers:
    return ParameterServers(num_workers, num_servers, RATE, server_bytes_per_s, latency_s=1e-5)


def test_few_servers_are_the_bottleneck() -> None:
    # Two servers take 16 workers' gigabytes: 8 GB each, in as the gradients and out as the parameters.
    assert servers(16, 2).synchronous_s(GB) == pytest.approx(8 * GB / RATE + 2e-5)
    assert servers(16, 2).synchronous_s(GB, pipelined=False) == pytest.approx(16 * GB / RATE + 2e-5)


def test_enough_servers_leave_the_workers_own_card() -> None:
    assert servers(16, 64).synchronous_s(GB) == pytest.approx(GB / RATE + 2e-5)
    assert servers(16, 4, server_bytes_per_s=4 * RATE).synchronous_s(GB) == pytest.approx(GB / RATE + 2e-5)


@pytest.mark.parametrize("num_workers", [2, 8, 64])
def test_against_the_ring(num_workers: int) -> None:
    as_many = ParameterServers(num_workers, num_workers, RATE, RATE).synchronous_s(GB)
    one = ParameterServers(num_workers, 1, RATE, RATE).synchronous_s(GB)
    assert as_many / ring_s(num_workers) == pytest.approx(num_workers / (2 * (num_workers - 1)))
    assert one >= ring_s(num_workers)


@pytest.mark.parametrize("num_workers", [2, 3, 8, 64])
def test_spread_servers_go_from_the_ring_to_half_of_it(num_workers: int) -> None:
    times = [spread_servers_s(GB, num_workers, spare, RATE) for spare in range(2 * num_workers)]
    assert times[0] == pytest.approx(ring_s(num_workers))  # no spare machine: nothing beats the ring
    assert times[num_workers] == pytest.approx(GB / RATE)
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize(("num_workers", "num_spare"), [(4, 1), (8, 3), (16, 16)])
def test_spread_servers_load_every_card_alike(num_workers: int, num_spare: int) -> None:
    # What spare and worker machines send when each spare one holds x and each worker y of the parameters.
    n, k = num_workers, num_spare
    y = (n - k) / (n * n + k * n - 2 * k)
    x = (1 - n * y) / k
    seconds = spread_servers_s(GB, n, k, RATE)
    assert n * x * GB / RATE == pytest.approx(seconds)
    assert ((1 - y) + (n - 1) * y) * GB / RATE == pytest.approx(seconds)


def test_asynchronous_workers_do_not_wait_until_the_servers_are_full() -> None:
    compute_s = 1.0
    own_s = compute_s + 2e-5 + 2 * GB / RATE
    assert servers(4, 4).asynchronous_updates_per_s(GB, compute_s) == pytest.approx(4 / own_s)
    assert servers(64, 2).asynchronous_updates_per_s(GB, compute_s) == pytest.approx(2 * RATE / GB)
    assert servers(64, 2).mean_staleness == 63


def test_a_group_over_nodes_reduces_inside_them_first(cluster: Cluster) -> None:
    """16 nodes of 8 at 10 GB/s each: 80 GB/s a node."""
    exchange = gradient_exchange(GB, Group(128), cluster, num_servers=16)
    inside_s = 2 * (7 / 8 * GB / 100e9 + 7e-6)
    assert exchange.inside_s == pytest.approx(inside_s)
    assert exchange.parameter_server_s == pytest.approx(inside_s + GB / 80e9 + 2 * 10e-6)
    all_reduce_s = collective_time_s(Collective("all_reduce", GB, Group(128)), cluster)
    assert exchange.all_reduce_s == all_reduce_s
    assert exchange.speedup == pytest.approx(all_reduce_s / exchange.parameter_server_s)


def test_one_rank_per_node_beats_the_ring_with_spare_servers_only(cluster: Cluster) -> None:
    group = Group(16, stride=8)
    assert gradient_exchange(GB, group, cluster, num_servers=16).speedup > 1.7
    assert gradient_exchange(GB, group, cluster, num_servers=4).speedup < 0.6


def test_errors(cluster: Cluster) -> None:
    with pytest.raises(CostModelError, match="a worker and a server: got 0 and 2"):
        ParameterServers(0, 2, RATE, RATE)
    with pytest.raises(CostModelError, match="rates above 0"):
        ParameterServers(2, 2, RATE, 0)
    with pytest.raises(CostModelError, match="over 4 worker machines and -1 spare"):
        spread_servers_s(GB, 4, -1, RATE)
    with pytest.raises(CostModelError, match="group of one"):
        gradient_exchange(GB, Group(1), cluster, num_servers=1)
