"""The fields of a cluster file, as `hardware_db.cluster_file` documents them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

from pydantic import Discriminator, Field, Tag

from hardware_db import catalog
from hardware_db.facts import Fact, Record
from hardware_db.machine import Level
from hardware_db.schema import Accelerator, Dtype, EfficiencyFacts, HostLink, Kind, Memory, ScaleOut, ScaleUp

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class EfficiencyForm(Record):
    matmul: Share | None = None
    attention: Share | None = None
    memory: Share | None = None
    launch_overhead_s: Annotated[float, Field(ge=0)] | None = None
    reserved_memory_bytes: Annotated[float, Field(ge=0)] | None = None

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


class LevelForm(Record):
    name: str
    devices: Count
    bandwidth_bytes_per_s: Positive
    latency_s: Annotated[float, Field(ge=0)]
    topology: Literal["switch", "fat_tree", "mesh", "ring", "torus", "pcie"] = "switch"
    efficiency: Share = 1.0
    oversubscription: Annotated[float, Field(ge=1)] = 1.0

    def level(self) -> Level:
        rate = self.bandwidth_bytes_per_s / self.oversubscription
        return Level(self.name, self.devices, rate * self.efficiency, self.latency_s, self.topology, rate)


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
    efficiency: EfficiencyForm = EfficiencyForm()
    host_memory_bytes_per_device: Positive | None = None
    price_usd_per_device_hour: Annotated[float, Field(ge=0)] | None = None


class LevelsForm(Form):
    device: DeviceField
    levels: Annotated[tuple[LevelForm, ...], Field(min_length=1)]
    devices_per_node: Count | None = None


class NodeForm(Form):
    node: str
    count: Count = 1
    device: DeviceField | None = None
    scale_out_bytes_per_s_per_device: Positive | None = None
    oversubscription: Annotated[float, Field(ge=1)] = 1.0


def form_at(form: type[Form], path: Sequence[int | str]) -> type[Record]:
    """The form that owns the fields at `path` inside `form`."""
    inner: dict[int | str, type[Record]] = {
        "levels": LevelForm,
        "device": DeviceForm,
        "efficiency": EfficiencyForm,
    }
    return next((inner[step] for step in reversed(path) if step in inner), form)


def given(value: float) -> Fact:
    """A fact that the user's file states."""
    return Fact(value=value, source="user", confidence="user")
