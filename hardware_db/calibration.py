"""What a cluster makes of a profile: measured figures in place of published ones.

Rates become shares of the published figures where the accelerator is one of the catalog, and are the figures
themselves where it is not (a CPU, a part that nobody has described). Links become alpha-beta lines through
the measured collectives, and the tables themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby

from hardware_db import catalog
from hardware_db.errors import HardwareError
from hardware_db.facts import Fact
from hardware_db.machine import Cluster, Level
from hardware_db.profile import CollectiveTime, Link, Profile
from hardware_db.schema import Accelerator, EfficiencyFacts, HostLink, Memory, ScaleOut, ScaleUp
from hardware_db.transport import MeasuredCollective

__all__ = ["accelerator_of", "calibrated"]


def calibrated(cluster: Cluster, profile: Profile) -> Cluster:
    """`cluster` with what was measured in place of what is published; a torus keeps the measured shape.

    Raises HardwareError when the profile is of another device.
    """
    device = cluster.device
    if profile.accelerator is None:
        if profile.kind != device.kind:
            raise HardwareError(_other_device(cluster, profile, profile.device))
        device = accelerator_of(profile, links=device)
    else:
        if catalog.accelerator(profile.accelerator).id != device.id:
            raise HardwareError(_other_device(cluster, profile, profile.accelerator))
        device = device.with_efficiency(_efficiency(profile, device))
    return replace(cluster, device=device, levels=tuple(_levels(cluster.levels, profile)), slices=())


def accelerator_of(profile: Profile, links: Accelerator | None = None) -> Accelerator:
    """The accelerator that was measured: the catalog's, or one whose figures are the measured rates.

    The profile says nothing of a device's own links; they are those of `links`.
    """
    if profile.accelerator is not None:
        return catalog.accelerator(profile.accelerator)
    peaks = {dtype: _fact(rate, profile) for dtype, rate in profile.peak_flops_per_s.items()}
    bare = Accelerator(
        id=profile.device,
        name=profile.device,
        vendor="custom",
        kind=profile.kind,
        status="user",
        peak_dense_flops_per_s=peaks,
        memory=Memory(
            kind=None,
            capacity_bytes=_fact(profile.memory_bytes, profile),
            capacity_published_as="GiB",
            bandwidth_bytes_per_s=_fact(profile.bytes_per_s, profile),
        ),
        scale_up=links.scale_up if links else ScaleUp(),
        scale_out=links.scale_out if links else ScaleOut(),
        host_link=links.host_link if links else HostLink(),
        efficiency_facts=catalog.efficiency_defaults().of(profile.kind, "custom"),
    )
    return bare.with_efficiency(_efficiency(profile, bare))


def _efficiency(profile: Profile, device: Accelerator) -> EfficiencyFacts:
    """What the profile says, as shares of the figures of `device`."""
    dtype = profile.matmul[0].dtype
    peak = device.peak_flops_per_s(dtype)
    shares = {
        "matmul": profile.peak_flops_per_s[dtype] / peak,
        "memory": profile.bytes_per_s / device.memory_bandwidth_bytes_per_s,
    }
    if (row := profile.best_attention) is not None:
        # The schema's share is that of an attention of any length, of which these dimensions reach a part.
        assumed = device.efficiency
        part = 1 / (1 + assumed.head_dim_half / row.head_dim) / (1 + assumed.sequence_half / row.seq)
        shares["attention"] = shares["attention_native"] = row.forward_flops_per_s / peak / part
    _check_shares(shares, profile, device)
    facts = {name: _fact(min(1.0, share), profile) for name, share in shares.items()}
    return EfficiencyFacts(launch_overhead_s=_fact(profile.launch_overhead.per_kernel_s, profile), **facts)


def _check_shares(shares: Mapping[str, float], profile: Profile, device: Accelerator) -> None:
    """Nothing is faster than published, unless it is something else."""
    for name in ("matmul", "memory"):
        if profile.accelerator is not None and shares[name] > 1:
            raise HardwareError(
                f"the profile of {profile.device!r} reaches {shares[name]:.2f} of the {name} rate published "
                f"for {device.id}; if that is another device, name it with `autopar calibrate --accelerator`"
            )


def _levels(levels: Sequence[Level], profile: Profile) -> Iterator[Level]:
    """The levels, each with the line of the widest measured group that it connects.

    Of two groups as wide, the one with the larger stride counts: its members meet on this level alone.
    """
    inner_devices = 1
    for level in levels:
        fitting = [link for link in profile.links if inner_devices < link.num_devices <= level.num_devices]
        link = max(fitting, key=lambda link: (link.num_devices, link.stride), default=None)
        tables = tuple(_tables(profile.collectives, inner_devices, level.num_devices))
        inner_devices = level.num_devices
        if link is not None:
            level = _measured_level(level, link, tables)
        yield level


def _measured_level(level: Level, link: Link, tables: tuple[MeasuredCollective, ...]) -> Level:
    """The level with nothing left of what its links are published to do."""
    return replace(
        level,
        bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
        latency_s=link.latency_s,
        alone_bytes_per_s=None,
        start_s=0.0,
        protocols=(),
        concurrent_messages=1,
        reduction=None,
        measured=tables,
    )


def _tables(
    rows: Sequence[CollectiveTime], inner_devices: int, num_devices: int
) -> Iterator[MeasuredCollective]:
    """The tables of the groups whose members meet on this level alone.

    What took longer than a larger payload was held up by something else, and could have been as quick.
    """

    def group_of(row: CollectiveTime) -> tuple[str, int, int]:
        return row.kind, row.world_size, row.stride

    for (kind, size, stride), group in groupby(sorted(rows, key=group_of), key=group_of):
        seconds = {row.bytes: row.seconds for row in group}
        if inner_devices <= stride and size * stride <= num_devices and len(seconds) > 1:
            falling = sorted(seconds, reverse=True)
            times = accumulate((seconds[num_bytes] for num_bytes in falling), min)
            points = sorted(zip(map(float, falling), times, strict=True))
            yield MeasuredCollective(kind, (size,), tuple(points))


def _other_device(cluster: Cluster, profile: Profile, measured: str) -> str:
    return (
        f"the profile was measured on {measured} ({profile.device}, {profile.date}), but the device of "
        f"{cluster.id} is {cluster.device.id}; name a profile of that device"
    )


def _fact(value: float, profile: Profile) -> Fact:
    return Fact(value=value, source=f"profile of {profile.device}, {profile.date}", confidence="derived")
