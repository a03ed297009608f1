"""The record format: one published training run, its configuration and what was measured.

A file is a JSON object with a list `records` (or that list). Fields that are not named here are ignored, so
that a file may carry more than is used. A null means that the source does not say.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from autopar.errors import AutoparError

Tier = Literal["A", "B", "C", "oom"]
MemoryKind = Literal["allocated", "reserved", "device"]
Count = Annotated[int, Field(ge=1)]
Degree = Annotated[Count, BeforeValidator(lambda value: 1 if value is None else value)]
Positive = Annotated[float, Field(gt=0)]

_NOT_A_RUN: Final = "claim"
_BYTES_PER_UNIT: Final = {"bytes": 1.0, "gb": 1e9, "gib": 2.0**30, "mb": 2.0**20, "mib": 2.0**20}
_MEMORY_KINDS: Final[tuple[MemoryKind, ...]] = ("allocated", "reserved", "device")


class RecordError(AutoparError):
    """A file of records that does not say what it should; names the file, the record and the field."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class LatentAttention(_Facts):
    """The ranks and widths per head of DeepSeek's multi-head latent attention."""

    q_lora: Count | None = None
    kv_lora: Count
    nope: Count
    rope: Count
    v: Count


class ModelFacts(_Facts):
    """A transformer language model by its sizes. `ffn_hidden` is one matrix's width, also where gated.

    `window` is the length of sliding-window attention, `window_frac` the share of layers that have it;
    `dense_layers` are the leading layers without experts, `dropout` the probability in training.
    """

    family: str = ""
    layers: Count
    hidden: Count
    heads: Count
    kv_heads: Count
    ffn_hidden: Count
    gated_mlp: bool
    vocab: Count
    seq: Count
    tied_embed: bool = False
    head_dim: Count | None = None
    alibi: bool = False
    learned_pos: bool | None = None
    dropout: float | None = None
    experts: Count | None = None
    topk: Count | None = None
    shared_experts: int = 0
    expert_ffn: Count | None = None
    dense_layers: int = 0
    mla: LatentAttention | None = None
    window: Count | None = None
    window_frac: float = 1.0
    n_params: Count | None = None


class ClusterFacts(_Facts):
    """Accelerators and links in the words of the source."""

    accelerator: str
    n_devices: Count
    devices_per_node: Count
    intra_node_link: str | None = None
    inter_node_link: str | None = None
    slices: Count = 1


class ParallelismFacts(_Facts):
    """Degrees and settings; `zero_group` (or `fsdp_size`) are the ranks that share the sharded states."""

    tp: Degree = 1
    pp: Degree = 1
    dp: Count | None = None
    cp: Degree = 1
    ep: Degree = 1
    virtual_stages: Count | None = None
    zero_stage: Literal[0, 1, 2, 3] = 0
    fsdp: bool = False
    fsdp_size: Count | None = None
    zero_group: Count | Literal["all"] | None = None
    sequence_parallel: bool | None = None
    recompute: str | None = None
    remat_policy: str | None = None
    schedule: str | None = None
    tp_overlap: bool | None = None
    pp_partition: str | None = None


class BatchFacts(_Facts):
    """Samples per step of the whole run, and per data-parallel replica and microbatch."""

    global_batch: Count | None = None
    micro_batch: Count | None = None


class Record(_Facts):
    """One published run.

    `tier` is A for complete records, B where one setting is unknown, C where it should not be judged by, and
    oom for a run that was published as out of memory.
    """

    id: str
    group: str
    source: str
    tier: Tier
    model: ModelFacts
    cluster: ClusterFacts
    parallelism: ParallelismFacts
    batch: BatchFacts = BatchFacts()
    precision: str
    software: str | None = None
    era: str | None = None
    measured: Mapping[str, Any] = Field(default_factory=dict)
    derived: Mapping[str, Any] = Field(default_factory=dict)
    anchor_predictions: Mapping[str, float] = Field(default_factory=dict)
    notes: str = ""
    flags: tuple[str, ...] = ()

    @property
    def out_of_memory(self) -> bool:
        """Whether the run was published as out of memory."""
        return self.tier == "oom"

    @property
    def tokens_per_s_per_device(self) -> float | None:
        """Tokens per second and device, as published or from the step time; None without either."""
        if (rate := self._figure("tokens_per_s_per_device")) is not None:
            return rate
        if (rate := self._figure("tokens_per_s")) is not None:
            return rate / self.cluster.n_devices
        step_s = self._figure("step_time_s")
        if step_s is None or self.tokens_per_step is None:
            return None
        return self.tokens_per_step / step_s / self.cluster.n_devices

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one step of the whole run, None where the global batch is unknown."""
        return None if self.batch.global_batch is None else self.batch.global_batch * self.model.seq

    @property
    def step_time_s(self) -> float | None:
        """Seconds per step: measured, or tokens per step over the token rate; None where neither is known."""
        if (step_s := self._figure("step_time_s")) is not None:
            return step_s
        rate = self.tokens_per_s_per_device
        if rate is None or self.tokens_per_step is None:
            return None
        return self.tokens_per_step / (rate * self.cluster.n_devices)

    @property
    def measured_memory_bytes(self) -> Mapping[MemoryKind, tuple[float, ...]]:
        """Peak memory by how it was read, in bytes: one figure, or one for each rank that was reported.

        `allocated` and `reserved` are the framework's allocator, `device` everything on the card
        (nvidia-smi). A field that does not say which is `reserved`, which is what training logs print.
        """
        found: dict[MemoryKind, tuple[float, ...]] = {}
        for name, value in self.measured.items():
            words = name.split("_")
            unit = next((_BYTES_PER_UNIT[word] for word in words if word in _BYTES_PER_UNIT), None)
            if unit is None or not {"memory", "allocated", "reserved"} & set(words):
                continue
            stated = value.values() if isinstance(value, Mapping) else [value]
            figures = [figure for figure in stated if isinstance(figure, int | float)]
            kind = _memory_kind(words)
            if figures and len(figures) >= len(found.get(kind, ())):
                found[kind] = tuple(unit * float(figure) for figure in figures)
        return found

    @property
    def memory_kind(self) -> MemoryKind | None:
        """How `memory_bytes` was read: the kind closest to what the program itself holds."""
        known = self.measured_memory_bytes
        return next((kind for kind in _MEMORY_KINDS if kind in known), None)

    @property
    def memory_bytes(self) -> float | None:
        """Peak memory in bytes of the fullest device that was reported, None where none was."""
        kind = self.memory_kind
        return None if kind is None else max(self.measured_memory_bytes[kind])

    def _figure(self, name: str) -> float | None:
        values = (self.measured.get(name), self.derived.get(name))
        known = (value for value in values if isinstance(value, int | float) and value > 0)
        return next(map(float, known), None)


def read_records(path: str | Path) -> tuple[Record, ...]:
    """The runs in a file, in its order; entries of tier `claim` are not runs and are left out.

    Raises `RecordError`, which names the file, the record and the field.
    """
    entries = _entries(Path(path))
    runs = [(index, entry) for index, entry in enumerate(entries) if _text(entry, "tier") != _NOT_A_RUN]
    records = tuple(_record(path, index, entry) for index, entry in runs)
    count = Counter(record.id for record in records)
    for id, times in count.items():
        if times > 1:
            raise RecordError(f"{path}: the id {id!r} stands {times} times; give every run its own")
    return records


def _entries(path: Path) -> list[Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: is not JSON: {error}") from error
    entries = document.get("records") if isinstance(document, Mapping) else document
    if not isinstance(entries, list):
        raise RecordError(f"{path}: expected an object with a list `records`, got {_shown(document)}")
    return entries


def _record(path: str | Path, index: int, entry: Any) -> Record:
    try:
        return Record.model_validate(entry)
    except ValidationError as error:
        name = _text(entry, "id") or f"records[{index}]"
        problems = "; ".join(dict.fromkeys(_sentence(problem) for problem in error.errors()))
        raise RecordError(f"{path}: record {name}: {problems}") from None


def _sentence(problem: ErrorDetails) -> str:
    field = ".".join(map(str, problem["loc"])) or "record"
    if problem["type"] == "missing":
        return f"{field} is missing"
    return (
        f"{field}: got {_shown(problem['input'])}, expected {problem['msg'].removeprefix('Input should be ')}"
    )


def _memory_kind(words: list[str]) -> MemoryKind:
    if "allocated" in words:
        return "allocated"
    return "device" if "nvidia" in words else "reserved"


def _text(entry: Any, name: str) -> str | None:
    value = entry.get(name) if isinstance(entry, Mapping) else None
    return value if isinstance(value, str) else None


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
