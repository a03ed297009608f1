"""A profile: what `autopar calibrate` measured on a machine, as the file says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from hardware_db.errors import HardwareError
from hardware_db.facts import Record
from hardware_db.schema import Dtype, Kind

__all__ = [
    "AttentionRate",
    "CollectiveTime",
    "LaunchOverhead",
    "Link",
    "MatmulRate",
    "MemoryRate",
    "Profile",
    "load_profile",
    "reported_names",
]

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
GroupSize = Annotated[int, Field(ge=2)]

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"]


class _DeviceNames(Record):
    source: str
    confidence: str
    note: str
    accelerators: dict[str, str]


class MatmulRate(Record):
    """Rate of `[m, k] @ [k, n]`: m tokens through a linear layer from k to n features."""

    dtype: Dtype
    m: Count
    n: Count
    k: Count
    flops_per_s: Positive
    spread: NonNegative


class MemoryRate(Record):
    """Rate at which a pointwise op of two operands moves `bytes`, reads and writes together."""

    bytes: Count
    bytes_per_s: Positive
    spread: NonNegative


class AttentionRate(Record):
    """Rates of fused attention over `[batch, heads, seq, head_dim]`; a causal mask halves the FLOPs, and the
    backward has 2.5 times those of the forward."""

    dtype: Dtype
    batch: Count
    heads: Count
    seq: Count
    head_dim: Count
    causal: bool
    forward_flops_per_s: Positive
    backward_flops_per_s: Positive
    spread: NonNegative


class LaunchOverhead(Record):
    """Time of one op that is all overhead, in a long row of its kind.

    `forward_s` and `backward_s` are those of an eager program, which waits for the host where that is the
    slower one. `device_s` is the device's alone, None where the host is the device.
    """

    forward_s: Positive
    backward_s: Positive
    device_s: Positive | None
    spread: NonNegative

    @property
    def per_kernel_s(self) -> float:
        """What an op costs besides its work when the host keeps ahead of the device."""
        return (self.forward_s + self.backward_s) / 2 if self.device_s is None else self.device_s


class CollectiveTime(Record):
    """Time of one collective over groups of `world_size` ranks that lie `stride` apart, all groups at once.

    `bytes` is the payload as `costmodel.Collective` counts it; the slowest rank counts.
    """

    kind: CollectiveKind
    world_size: GroupSize
    stride: Count
    bytes: Count
    seconds: Positive
    spread: NonNegative


class Link(Record):
    """The alpha-beta line through the collectives of one kind of group: latency of a step and bandwidth of a
    rank, one direction. `relative_error` is the root mean square of what the line misses."""

    world_size: GroupSize
    stride: Count
    latency_s: NonNegative
    bandwidth_bytes_per_s: Positive
    relative_error: NonNegative

    @property
    def num_devices(self) -> int:
        """Consecutive devices that the group reaches over."""
        return self.world_size * self.stride


class Profile(Record):
    """What was measured, on what, with which software, and when.

    `device` is the name that the library reports, `accelerator` its id in the catalog or None; `num_threads`
    are those of one process. The dtype that `matmul` begins with stands for all where one number has to.
    `spread` of a row is the interquartile range of its samples over their median.
    """

    schema_version: Literal[1] = 1
    device: str
    accelerator: str | None
    kind: Kind
    memory_bytes: Count
    software: Mapping[str, str]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    num_threads: Count
    launch_overhead: LaunchOverhead
    memory: Annotated[tuple[MemoryRate, ...], Field(min_length=1)]
    matmul: Annotated[tuple[MatmulRate, ...], Field(min_length=1)]
    attention: tuple[AttentionRate, ...] = ()
    links: tuple[Link, ...] = ()
    collectives: tuple[CollectiveTime, ...] = ()

    @property
    def peak_flops_per_s(self) -> dict[Dtype, float]:
        """The best rate that a matrix product reached, by dtype."""
        return {row.dtype: self._best(row.dtype) for row in self.matmul}

    @property
    def bytes_per_s(self) -> float:
        """Memory bandwidth: the rate of the largest transfer, which no cache holds."""
        return max(self.memory, key=lambda row: row.bytes).bytes_per_s

    @property
    def best_attention(self) -> AttentionRate | None:
        """The fastest forward in the dtype that stands for all, with a causal mask if any has one."""
        rows = [row for row in self.attention if row.dtype == self.matmul[0].dtype]
        return max(rows, key=lambda row: (row.causal, row.forward_flops_per_s), default=None)

    def to_json(self) -> str:
        """The file's text: a row of a table on a line."""
        fields = self.model_dump(mode="json")
        return "{\n" + ",\n".join(f"  {json.dumps(name)}: {_text(fields[name])}" for name in fields) + "\n}\n"

    def _best(self, dtype: Dtype) -> float:
        return max(row.flops_per_s for row in self.matmul if row.dtype == dtype)


def load_profile(path: Path) -> Profile:
    """The profile in a file that `autopar calibrate` wrote; a HardwareError names file and field."""
    try:
        return Profile.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HardwareError(f"profile {path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise HardwareError(
            f"profile {path}: {where}: {problem['msg']}; write it anew with `autopar calibrate`"
        ) from None


@cache
def reported_names() -> Mapping[str, str]:
    """The ids of accelerators by the name under which libraries report them ("NVIDIA H200")."""
    text = (files("hardware_db") / "data" / "device_names.json").read_text(encoding="utf-8")
    return MappingProxyType(_DeviceNames.model_validate_json(text).accelerators)


def _text(value: object) -> str:
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"    {json.dumps(_rounded(row))}" for row in value) + "\n  ]"
    return json.dumps(_rounded(value))


def _rounded(value: object) -> object:
    """Four digits of every measured number: more than a repetition of the measurement shares."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
