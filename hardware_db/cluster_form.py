"""The fields of a cluster file, as `hardware_db.cluster_file` documents them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Final, Literal

from pydantic import Discriminator, Field, Tag

from hardware_db import catalog
from hardware_db.facts import Fact, Record
from hardware_db.machine import Level, LevelTopology
from hardware_db.schema import Accelerator, Dtype, EfficiencyFacts, HostLink, Kind, Memory, ScaleOut, ScaleUp
from hardware_db.transport import InNetworkReduction, MeasuredCollective, Protocol
from hardware_db.units import bytes_per_s_from_gbit

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
AtLeastOne = Annotated[float, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class EfficiencyForm(Record):
    matmul: Share | None = None
    matmul_fp8: Share | None = None
    attention: Share | None = None
    attention_native: Share | None = None
    memory: Share | None = None
    launch_overhead_s: NotNegative | None = None
    reserved_memory_bytes: NotNegative | None = None
    num_cores: AtLeastOne | None = None
    tile_m: AtLeastOne | None = None
    tile_n: AtLeastOne | None = None
    tile_reuse: NotNegative | None = None
    wave_loss: Annotated[float, Field(ge=0, le=1)] | None = None
    fill_k: NotNegative | None = None
    edge_sharpness: AtLeastOne | None = None
    head_dim_half: NotNegative | None = None
    sequence_half: NotNegative | None = None

    def facts(self) -> EfficiencyFacts:
        return EfficiencyFacts(**{name: given(value) for name, value in self if value is not None})


class DeviceForm(Record):
    name: str = "custom device"
    vendor: str = "custom"
    kind: Kind = "gpu"
    memory_bytes: Positive
    memory_bandwidth_bytes_per_s: Positive
    peak_flops_per_s: Annotated[dict[Dtype, Positive], Field(min_length=1)]
    efficiency: EfficiencyForm = EfficiencyForm()

    def accelerator(self, links: Accelerator | None = None) -> Accelerator:
        """The accelerator that this describes; its links, of which it says nothing, are those of `links`."""
        defaults = catalog.efficiency_defaults().of(self.kind, self.vendor)
        return Accelerator(
            id=self.name,
            name=self.name,
            vendor=self.vendor,
            kind=self.kind,
            status="user",
            peak_dense_flops_per_s={dtype: given(rate) for dtype, rate in self.peak_flops_per_s.items()},
            memory=Memory(
                kind=None,
                capacity_bytes=given(self.memory_bytes),
                capacity_published_as="GB_label",
                bandwidth_bytes_per_s=given(self.memory_bandwidth_bytes_per_s),
            ),
            scale_up=links.scale_up if links else ScaleUp(),
            scale_out=links.scale_out if links else ScaleOut(),
            host_link=links.host_link if links else HostLink(),
            efficiency_facts=self.efficiency.facts().over(defaults),
        )


class ProtocolForm(Record):
    name: str
    start_s: NotNegative = 0.0
    step_s: NotNegative
    bandwidth_share: Share

    def protocol(self) -> Protocol:
        return Protocol(self.name, self.start_s, self.step_s, self.bandwidth_share)


class ReductionForm(Record):
    all_reduce_bytes_per_s: Positive
    start_s: NotNegative = 0.0
    min_peers: Annotated[int, Field(ge=2)] = 2

    def reduction(self) -> InNetworkReduction:
        return InNetworkReduction(self.all_reduce_bytes_per_s, self.start_s, self.min_peers)


class MeasuredForm(Record):
    kind: Literal[
        "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "send_recv"
    ]
    shape: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)]
    points: tuple[tuple[Positive, Positive], ...]

    def measured(self) -> MeasuredCollective:
        return MeasuredCollective(self.kind, self.shape, self.points)


class LevelForm(Record):
    name: str
    devices: Count
    bandwidth_bytes_per_s: Positive
    latency_s: NotNegative
    topology: LevelTopology = "switch"
    efficiency: Share = 1.0
    oversubscription: Annotated[float, Field(ge=1)] = 1.0
    alone_bytes_per_s: Positive | None = None
    start_s: NotNegative = 0.0
    protocols: tuple[ProtocolForm, ...] = ()
    concurrent_messages: Count = 1
    level_by_level: bool | None = None
    tree_bandwidth_share: Share = 1.0
    in_network_reduction: ReductionForm | None = None
    measured: tuple[MeasuredForm, ...] = ()

    def level(self, level_by_level: bool) -> Level:
        rate, alone, reduction = (
            self.bandwidth_bytes_per_s / self.oversubscription,
            self.alone_bytes_per_s,
            self.in_network_reduction,
        )
        return Level(
            self.name,
            self.devices,
            rate * self.efficiency,
            self.latency_s,
            self.topology,
            line_rate_bytes_per_s=rate,
            alone_bytes_per_s=None if alone is None else alone * self.efficiency,
            start_s=self.start_s,
            protocols=tuple(form.protocol() for form in self.protocols),
            concurrent_messages=self.concurrent_messages,
            level_by_level=level_by_level if self.level_by_level is None else self.level_by_level,
            tree_bandwidth_share=self.tree_bandwidth_share,
            reduction=None if reduction is None else reduction.reduction(),
            measured=tuple(form.measured() for form in self.measured),
        )

    @staticmethod
    def document(level: Level) -> dict[str, object]:
        """The fields that `level()` makes this level of again, without those at their defaults."""
        form = LevelForm(
            name=level.name,
            devices=level.num_devices,
            bandwidth_bytes_per_s=level.bandwidth_bytes_per_s,
            latency_s=level.latency_s,
            topology=level.topology,
            alone_bytes_per_s=level.alone_bytes_per_s,
            start_s=level.start_s,
            protocols=tuple(ProtocolForm(**asdict(protocol)) for protocol in level.protocols),
            concurrent_messages=level.concurrent_messages,
            level_by_level=level.level_by_level,
            tree_bandwidth_share=level.tree_bandwidth_share,
            in_network_reduction=None
            if level.reduction is None
            else ReductionForm(**asdict(level.reduction)),
            measured=tuple(MeasuredForm(**asdict(table)) for table in level.measured),
        )
        always = {name: getattr(form, name) for name in ("bandwidth_bytes_per_s", "latency_s", "topology")}
        return {"name": form.name, "devices": form.devices, **always} | form.model_dump(
            mode="json", exclude_defaults=True
        )


_BY_ID: Final = "by id"
_INLINE: Final = "inline"
TAGS: Final = (_BY_ID, _INLINE, "[key]")
"""Steps that validation adds to the path of an error and that the file does not have."""
DeviceField = Annotated[
    Annotated[str, Tag(_BY_ID)] | Annotated[DeviceForm, Tag(_INLINE)],
    Discriminator(lambda device: _INLINE if isinstance(device, Mapping) else _BY_ID),
]


class Form(Record):
    name: str | None = None
    profile: str | None = None
    efficiency: EfficiencyForm = EfficiencyForm()
    host_memory_bytes_per_device: Positive | None = None
    host_memory_bytes_per_s_per_device: Positive | None = None
    host_link_bytes_per_s_per_device: Positive | None = None
    price_usd_per_device_hour: Annotated[float, Field(ge=0)] | None = None


class LevelsForm(Form):
    device: DeviceField | None = None
    levels: Annotated[tuple[LevelForm, ...], Field(min_length=1)]
    devices_per_node: Count | None = None


class NodeForm(Form):
    node: str
    count: Count = 1
    device: DeviceField | None = None
    scale_out_bytes_per_s_per_device: Positive | None = None
    oversubscription: Annotated[float, Field(ge=1)] = 1.0


class BetweenForm(Record):
    gbit_per_s: Positive | None = None
    bytes_per_s: Positive | None = None
    latency_s: NotNegative | None = None

    @property
    def link_bytes_per_s(self) -> float | None:
        """The rate of a node, if one is given."""
        return self.bytes_per_s if self.gbit_per_s is None else bytes_per_s_from_gbit(self.gbit_per_s)


class PoolsForm(Record):
    name: str | None = None
    pools: Annotated[tuple[str | dict[str, object], ...], Field(min_length=2)]
    between: BetweenForm = BetweenForm()


def form_at(form: type[Record], path: Sequence[int | str]) -> type[Record]:
    """The form that owns the fields at `path` inside `form`."""
    inner: dict[int | str, type[Record]] = {
        "levels": LevelForm,
        "device": DeviceForm,
        "efficiency": EfficiencyForm,
        "protocols": ProtocolForm,
        "in_network_reduction": ReductionForm,
        "measured": MeasuredForm,
        "between": BetweenForm,
    }
    return next((inner[step] for step in reversed(path) if step in inner), form)


def given(value: float) -> Fact:
    """A fact that the user's file states."""
    return Fact(value=value, source="user", confidence="user")
