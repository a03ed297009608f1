"""How a record was run, in autopar's terms, and what its source leaves open.

Sources seldom tell everything. What they do not tell (the microbatch, virtual stages, recomputation) has
several possible values; `Configuration.candidates` yields every parallelism that agrees with the record, and
the fastest that fits is what a person who tuned the run would have taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal

from autopar.plan import Parallelism, Recompute, ScheduleName
from autopar.records.schema import ParallelismFacts, Record, RecordError
from autopar.records.software import habits, software_era
from costmodel import CostModelError, Software
from costmodel.orders import V_SCHEDULES, check_schedule

MICROBATCHES_PER_STAGE: Final = 8
"""Of a pipeline whose global batch is not published: its bubble is then small, as in any tuned run."""

LOW_PRECISIONS: Final = ("fp8", "fp4")
"""What only matrix products inside blocks run in, the rest in the model's own precision."""

_PARTIAL: Final = re.compile(r"partial:(\d+)-of-(\d+)-layers-full")
_OFFLOADED_LAYERS: Final = re.compile(r"cpu_offloading_num_layers\W+(\d+)")
_SCHEDULES: Final[dict[str, ScheduleName]] = {
    "dualpipe": "DualPipeV",
    "zbv": "ZBVZeroBubble",
    "zerobubble": "InterleavedZeroBubble",
    "gpipe": "GPipe",
    "bfs": "LoopedBFS",
}
_HARDWARE_DTYPES: Final = {"mxfp8": "fp8", "nvfp4": "fp4"}


@dataclass(frozen=True)
class Configuration:
    """A run, with every value that the settings its source leaves open may have.

    Attributes:
        known: the parallelism with open settings at their first value.
        replica_batch: samples per step of one data-parallel replica.
        microbatch_sizes, virtual_stages, recomputes: the possible values, one where the source tells.
        recompute_share: of the layers, how many recompute what `recompute` says.
        offload_share: of the layers, how many keep their activations in the host's memory.
        tp_overlap: whether tensor-parallel collectives overlap with their products (async TP).
        fsdp: whether `fully_shard`, or the like of it, shards.
        precision: of the matrix products, in the record's words: bf16, fp16, fp8, mxfp8, nvfp4.
        era: the software's, one of `costmodel.software_eras()`.
        schedule: of the pipeline, in the record's words.
    """

    known: Parallelism
    replica_batch: int
    microbatch_sizes: tuple[int, ...]
    virtual_stages: tuple[int, ...]
    recomputes: tuple[Recompute, ...]
    recompute_share: float
    offload_share: float
    tp_overlap: bool
    fsdp: bool
    precision: str
    era: str
    schedule: str | None

    @property
    def compute_dtype(self) -> str:
        """The hardware database's dtype of the matrix products."""
        return _HARDWARE_DTYPES.get(self.precision, self.precision)

    @property
    def low_precision(self) -> str | None:
        """The same where it is lower than that of the rest of the model."""
        return self.compute_dtype if self.compute_dtype in LOW_PRECISIONS else None

    @property
    def is_complete(self) -> bool:
        """Whether the source tells every setting."""
        return len(self.microbatch_sizes) == len(self.virtual_stages) == len(self.recomputes) == 1

    def used(self, era: Software) -> Software:
        """The era's software as the run used it."""
        return era.with_async_tensor_parallelism if self.tp_overlap else era

    def candidates(self) -> Iterator[Parallelism]:
        """Every parallelism that agrees with the record and that its schedule can run; at least one."""
        choices = list(product(self.microbatch_sizes, self.virtual_stages, self.recomputes))
        found = [self._chosen(*choice) for choice in choices]
        yield from [parallelism for parallelism in found if _runs(parallelism)] or found

    def _chosen(self, microbatch_size: int, virtual_stages: int, recompute: Recompute) -> Parallelism:
        return self.known.model_copy(
            update={
                "microbatch_size": microbatch_size,
                "num_microbatches": self.replica_batch // microbatch_size,
                "num_virtual_stages": virtual_stages,
                "schedule": _schedule(self.schedule, virtual_stages),
                "recompute": recompute,
            }
        )


def configuration(record: Record) -> Configuration:
    """What a record says about how it was run.

    Raises `RecordError` where degrees, groups and batches do not fit each other.
    """
    facts = record.parallelism
    dp = _replicas(record)
    shard = _shard_group(record, dp)
    replica_batch = _replica_batch(record, dp)
    sizes = _microbatch_sizes(record, replica_batch)
    stages = _virtual_stages(record)
    recomputes, share = _recomputation(record)
    known = Parallelism(
        dp_replicate=dp // shard,
        dp_shard=shard,
        cp=facts.cp,
        tp=facts.tp,
        ep=facts.ep,
        pp=facts.pp,
        sequence_parallel=facts.sequence_parallel if facts.tp > 1 else None,
        zero_stage=_zero_stage(facts),
        microbatch_size=sizes[0],
        num_microbatches=replica_batch // sizes[0],
        num_virtual_stages=stages[0],
        schedule=_schedule(facts.schedule, stages[0]),
        recompute=recomputes[0],
    )
    return Configuration(
        known=known,
        replica_batch=replica_batch,
        microbatch_sizes=sizes,
        virtual_stages=stages,
        recomputes=recomputes,
        recompute_share=share,
        offload_share=_offload_share(record),
        tp_overlap=bool(facts.tp_overlap),
        fsdp=facts.fsdp,
        precision=record.precision,
        era=software_era(record),
        schedule=facts.schedule,
    )


def _replicas(record: Record) -> int:
    """Data-parallel replicas: what the other degrees leave of the devices, whatever `dp` is printed."""
    facts, devices = record.parallelism, record.cluster.n_devices
    inner = facts.tp * facts.pp * facts.cp
    if devices % inner:
        raise RecordError(
            f"record {record.id}: {devices} devices are no multiple of tp {facts.tp} * pp {facts.pp} * "
            f"cp {facts.cp} = {inner}; check cluster.n_devices and parallelism"
        )
    return devices // inner


def _shard_group(record: Record, dp: int) -> int:
    """Replicas that share one copy of the sharded states; without sharding 1."""
    facts = record.parallelism
    if facts.zero_stage == 0:
        return 1
    group = _named_group(facts) or dp
    if dp % group:
        raise RecordError(
            f"record {record.id}: states are sharded over {group} ranks, which do not divide {dp} replicas; "
            "check parallelism.zero_group and fsdp_size"
        )
    return group


def _zero_stage(facts: ParallelismFacts) -> Literal[0, 1, 2, 3]:
    """The record's; but `fully_shard` in a pipeline keeps what it gathered for all microbatches of a step and
    reduces gradients after the last, as torchtitan runs it: what is left is sharded optimizer states."""
    return 1 if facts.fsdp and facts.pp > 1 else facts.zero_stage


def _named_group(facts: ParallelismFacts) -> int | None:
    return facts.zero_group if isinstance(facts.zero_group, int) else facts.fsdp_size


def _replica_batch(record: Record, dp: int) -> int:
    batch, size = record.batch.global_batch, record.batch.micro_batch or 1
    if batch is None:
        pp = record.parallelism.pp
        return size * (MICROBATCHES_PER_STAGE * pp if pp > 1 else 1)
    if batch % (dp * size):
        raise RecordError(
            f"record {record.id}: a global batch of {batch} is no multiple of {dp} replicas * microbatches "
            f"of {size}; check batch and parallelism"
        )
    return batch // dp


def _microbatch_sizes(record: Record, replica_batch: int) -> tuple[int, ...]:
    """The record's, else the powers of two that divide a replica's batch and leave one for every stage."""
    if record.batch.micro_batch is not None:
        return (record.batch.micro_batch,)
    powers = [2**n for n in range(replica_batch.bit_length()) if replica_batch % 2**n == 0]
    return tuple(size for size in powers if size == 1 or replica_batch // size >= record.parallelism.pp)


def _virtual_stages(record: Record) -> tuple[int, ...]:
    """The record's, else the numbers that cut the layers evenly.

    Where none does, the embedding and the head count as a layer each.
    """
    facts, layers = record.parallelism, record.model.layers
    if _schedule(facts.schedule, 1) in V_SCHEDULES:
        return (2,)
    if facts.virtual_stages is not None:
        return (facts.virtual_stages,)
    fewest = 2 if "interleaved" in (facts.schedule or "").lower() else 1
    for units in (layers, layers + 2):
        numbers = range(fewest, layers // facts.pp + 1)
        if even := tuple(number for number in numbers if units % (facts.pp * number) == 0):
            return even
    return (fewest,)


def _recomputation(record: Record) -> tuple[tuple[Recompute, ...], float]:
    """The possible modes and the share of layers they apply to."""
    selective = habits(software_era(record)).selective_recompute
    match record.parallelism.recompute:
        case None | "unknown":
            return ("none", selective, "full"), 1.0
        case "none":
            return ("none",), 1.0
        case "full":
            return ("full",), 1.0
        case "selective":
            return (selective,), 1.0
        case other:
            match = _PARTIAL.fullmatch(other)
            if match is None or not 0 < int(match[1]) <= int(match[2]):
                raise RecordError(
                    f"record {record.id}: parallelism.recompute is {other!r}, expected none, selective, "
                    "full, unknown, null or partial:K-of-N-layers-full"
                )
            return ("full",), int(match[1]) / int(match[2])


def _offload_share(record: Record) -> float:
    if "offload" in (record.parallelism.remat_policy or ""):
        return 1.0
    match = _OFFLOADED_LAYERS.search(record.notes)
    return int(match[1]) / record.model.layers if match else 0.0


def _schedule(words: str | None, virtual_stages: int) -> ScheduleName:
    """torch's name of a schedule that a record tells in its own words."""
    said = re.sub("[^a-z0-9]", "", (words or "").lower())
    named = next((name for sign, name in _SCHEDULES.items() if sign in said), None)
    return named or ("Interleaved1F1B" if virtual_stages > 1 else "1F1B")


def _runs(parallelism: Parallelism) -> bool:
    try:
        check_schedule(
            parallelism.schedule,
            parallelism.pp,
            parallelism.num_microbatches,
            parallelism.num_virtual_stages,
        )
    except CostModelError:
        return False
    return True
