"""What the data files say: accelerators, nodes, clusters and link classes.

Conventions. Rates are dense (no structured sparsity). Links are one direction, per card. An accelerator file
describes a *card*; software may see it as several *logical devices* (`logical_devices_per_card`), each with
an equal share.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Final, Literal, get_args

from pydantic import Field

from hardware_db.errors import HardwareError, MissingFactError, did_you_mean
from hardware_db.facts import UNKNOWN, Confidence, Dimensions, Fact, Record

Kind = Literal["gpu", "tpu", "npu", "mlu", "cpu"]
Dtype = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4", "int8"]
Topology = Literal["switch", "mesh", "ring", "torus", "none"]

_EXECUTED_AS: Final[dict[str, tuple[Dtype, ...]]] = {
    "fp64": ("fp64",),
    "fp32": ("fp32",),
    "tf32": ("tf32", "fp32"),
    "bf16": ("bf16", "fp16", "fp32"),
    "fp16": ("fp16", "bf16", "fp32"),
    "fp8": ("fp8", "bf16", "fp16", "fp32"),
    "fp4": ("fp4", "fp8", "bf16", "fp16", "fp32"),
    "int8": ("int8",),
}


class Efficiency(Record):
    """The share of the published figures that work reaches, and fixed overheads, as plain numbers.

    `matmul` and `matmul_fp8` (for 8 bits and fewer) are the shares of the peak rate of their dtype that a
    large product reaches, `memory` that of the memory bandwidth. `attention` is the share that fused
    attention reaches in its forward when written portably (FlashAttention-2), `attention_native` when written
    for the device (FlashAttention-3, cuDNN, a TPU's own). A kernel costs the device `launch_overhead_s`
    besides its work.

    `num_cores` compute a product's result in tiles of up to `tile_m` by `tile_n`, `wave_loss` of the last
    wave's idle cores being lost; `fill_k` is how much of the reduction a tile takes to fill its pipeline, and
    `tile_reuse` how fast smaller tiles get slower (`costmodel.roofline` has the formula). `head_dim_half` and
    `sequence_half` are the head dimension and the sequence at which attention reaches half of its best;
    `edge_sharpness` is how sharp the edge of the roofline is.
    """

    matmul: Annotated[float, Field(gt=0, le=1)]
    matmul_fp8: Annotated[float, Field(gt=0, le=1)]
    attention: Annotated[float, Field(gt=0, le=1)]
    attention_native: Annotated[float, Field(gt=0, le=1)]
    memory: Annotated[float, Field(gt=0, le=1)]
    launch_overhead_s: Annotated[float, Field(ge=0)]
    reserved_memory_bytes: Annotated[float, Field(ge=0)]
    num_cores: Annotated[float, Field(ge=1)]
    tile_m: Annotated[float, Field(ge=1)]
    tile_n: Annotated[float, Field(ge=1)]
    tile_reuse: Annotated[float, Field(ge=0)]
    wave_loss: Annotated[float, Field(ge=0, le=1)]
    fill_k: Annotated[float, Field(ge=0)]
    head_dim_half: Annotated[float, Field(ge=0)]
    sequence_half: Annotated[float, Field(ge=0)]
    edge_sharpness: Annotated[float, Field(ge=1)]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(value for _, value in self))


class EfficiencyFacts(Record):
    """The numbers of `Efficiency` with their sources; those a file leaves out come from `efficiency.json`."""

    matmul: Fact = UNKNOWN
    matmul_fp8: Fact = UNKNOWN
    attention: Fact = UNKNOWN
    attention_native: Fact = UNKNOWN
    memory: Fact = UNKNOWN
    launch_overhead_s: Fact = UNKNOWN
    reserved_memory_bytes: Fact = UNKNOWN
    num_cores: Fact = UNKNOWN
    tile_m: Fact = UNKNOWN
    tile_n: Fact = UNKNOWN
    tile_reuse: Fact = UNKNOWN
    wave_loss: Fact = UNKNOWN
    fill_k: Fact = UNKNOWN
    head_dim_half: Fact = UNKNOWN
    sequence_half: Fact = UNKNOWN
    edge_sharpness: Fact = UNKNOWN

    def over(self, defaults: EfficiencyFacts) -> EfficiencyFacts:
        """These facts where they are known, else the defaults."""
        known = {name: fact for name, fact in self if fact.value is not None}
        return defaults.model_copy(update=known)


class EfficiencyDefaults(Record):
    """Efficiencies to assume when an accelerator's own are not known: its vendor's, else its kind's."""

    kinds: dict[Kind, EfficiencyFacts]
    vendors: dict[str, EfficiencyFacts]

    def of(self, kind: Kind, vendor: str) -> EfficiencyFacts:
        return self.vendors.get(vendor, EfficiencyFacts()).over(self.kinds[kind])


class Memory(Record):
    kind: str | None
    capacity_bytes: Fact
    capacity_published_as: Literal["GB_label", "GiB"]
    bandwidth_bytes_per_s: Fact


class Cache(Record):
    bytes: Fact = UNKNOWN
    kind: str | None = None


class Slices(Record):
    """Shapes in which slices of a reconfigurable torus can be had: those of `below_cube`, and every box of
    whole cubes, which optical switches join."""

    cube: Dimensions
    below_cube: tuple[Dimensions, ...]


class ScaleUp(Record):
    """A card's own links to its neighbours. `link` is a key of `links.json`; `efficiency` replaces its."""

    name: str | None = None
    link: str | None = None
    technology: str | None = None
    topology: Topology = "none"
    num_links: Fact = UNKNOWN
    link_bytes_per_s: Fact = UNKNOWN
    total_bytes_per_s: Fact = UNKNOWN
    pair_bytes_per_s: Fact = UNKNOWN
    max_domain_cards: Fact = UNKNOWN
    in_network_reduction: bool | None = None
    torus_axes: int | None = None
    torus_wrap_multiple: Fact = UNKNOWN
    torus_wraps_whole_cubes_only: bool = False
    slices: Slices | None = None
    intra_card_bytes_per_s: Fact = UNKNOWN
    efficiency: Fact = UNKNOWN
    note: str | None = None


class ScaleOut(Record):
    gbit_per_s_per_card: Fact = UNKNOWN
    note: str | None = None


class HostLink(Record):
    """A card's link to its host; `link` is a key of `links.json`."""

    technology: str | None = None
    link: str = "pcie"
    bytes_per_s: Fact = UNKNOWN


class Price(Record):
    usd_per_card_hour: Fact
    provider: str
    sku: str | None = None
    kind: Literal["on_demand", "capacity_block"]
    as_of: str


class Accelerator(Record):
    """One accelerator card (or, from a cluster, one logical device of it)."""

    id: str
    name: str
    aliases: tuple[str, ...] = ()
    vendor: str
    kind: Kind
    form_factor: str | None = None
    status: Literal["shipping", "announced", "end_of_life", "export_variant", "discontinued", "user"]
    release_year: Fact = UNKNOWN
    logical_devices_per_card: Annotated[int, Field(ge=1)] = 1
    peak_dense_flops_per_s: dict[Dtype, Fact]
    memory: Memory
    on_chip_cache: Cache = Cache()
    scale_up: ScaleUp = ScaleUp()
    scale_out: ScaleOut = ScaleOut()
    host_link: HostLink = HostLink()
    tdp_watts: Fact = UNKNOWN
    prices: tuple[Price, ...] = ()
    measured: dict[str, Fact] = Field(default_factory=dict)
    efficiency_facts: EfficiencyFacts = EfficiencyFacts()
    notes: tuple[str, ...] = ()

    def __hash__(self) -> int:
        # The dicts inside have no hash; equality still compares every field.
        return hash((self.id, self.logical_devices_per_card))

    @property
    def memory_bytes(self) -> float:
        """Memory capacity in bytes, before any reserve; raises MissingFactError when unpublished."""
        return self.memory.capacity_bytes.require(f"{self.id}: memory.capacity_bytes")

    @property
    def memory_bandwidth_bytes_per_s(self) -> float:
        """Published memory bandwidth in bytes/s; raises MissingFactError when unpublished."""
        return self.memory.bandwidth_bytes_per_s.require(f"{self.id}: memory.bandwidth_bytes_per_s")

    @cached_property
    def efficiency(self) -> Efficiency:
        """The share of its figures that this device reaches; sources are in `efficiency_facts`."""
        facts = {name: fact.require(f"{self.id}: efficiency.{name}") for name, fact in self.efficiency_facts}
        return Efficiency(**facts)

    def executed_dtype(self, dtype: str) -> Dtype:
        """The format in which work of `dtype` runs: the first of its fallbacks with a published rate.

        A format without units of its own runs at the rate of the next one that can stand in for it: fp8 as
        bf16, bf16 as fp16 (a V100 trains in fp16), fp16 as bf16, either as fp32, tf32 as fp32. fp64, fp32 and
        int8 have no stand-in. Raises MissingFactError for an unknown rate, HardwareError for an unknown name.
        """
        if dtype not in _EXECUTED_AS:
            known = get_args(Dtype)
            raise HardwareError(
                f"unknown dtype {dtype!r}, expected one of {', '.join(known)}{did_you_mean(dtype, known)}"
            )
        for candidate in _EXECUTED_AS[dtype]:
            if (fact := self.peak_dense_flops_per_s.get(candidate)) is not None and fact.value is not None:
                return candidate
        tried = ", ".join(_EXECUTED_AS[dtype])
        raise MissingFactError(
            f"{self.id}: peak_dense_flops_per_s.{dtype} is unknown (looked for {tried}); "
            "give the rate in a cluster file of your own"
        )

    def peak_flops_per_s(self, dtype: str) -> float:
        """Dense peak rate in FLOP/s (op/s for int8) of work in `dtype`, run as `executed_dtype(dtype)`."""
        executed = self.executed_dtype(dtype)
        return self.peak_dense_flops_per_s[executed].require(f"{self.id}: peak_dense_flops_per_s.{executed}")

    @property
    def price_usd_per_card_hour(self) -> float | None:
        """The first listed price; lists start with the newest."""
        return self.prices[0].usd_per_card_hour.value if self.prices else None

    def with_efficiency(self, facts: EfficiencyFacts) -> Accelerator:
        """This accelerator with the known ones of `facts` in place of its own."""
        fields = {name: getattr(self, name) for name in Accelerator.model_fields}
        return Accelerator(**fields | {"efficiency_facts": facts.over(self.efficiency_facts)})

    def logical_device(self) -> Accelerator:
        """What software sees as one device: this card, or its equal share when a card shows as several."""
        parts = self.logical_devices_per_card
        if parts == 1:
            return self
        note = f"1/{parts} of the card"
        memory = self.memory.model_copy(
            update={
                "capacity_bytes": self.memory.capacity_bytes.scaled(1 / parts, note),
                "bandwidth_bytes_per_s": self.memory.bandwidth_bytes_per_s.scaled(1 / parts, note),
            }
        )
        peaks = {dtype: fact.scaled(1 / parts, note) for dtype, fact in self.peak_dense_flops_per_s.items()}
        return self.model_copy(
            update={
                "name": f"{self.name} ({note})",
                "logical_devices_per_card": 1,
                "peak_dense_flops_per_s": peaks,
                "memory": memory,
                "tdp_watts": self.tdp_watts.scaled(1 / parts, note),
            }
        )


class NodeScaleUp(Record):
    """How a node wires its cards: `domain_cards` is how many reach each other at scale-up rate.

    The domain may be smaller than the node (bridged pairs) or larger (a TPU pod).
    """

    name: str | None
    topology: Topology
    domain_cards: Fact
    torus_axes: int | None = None
    num_switches: Fact
    note: str | None = None


class NodeScaleOut(Record):
    """A host's network cards; `link` is a key of `links.json`."""

    num_nics: Fact
    gbit_per_s_per_nic: Fact
    link: str = "network"


class PcieTree(Record):
    """How a host joins its cards: some share a switch, the switches of a socket its root complex, sockets a
    link of `socket_bytes_per_s` in each direction. Where nothing is known, one level joins all cards."""

    cards_per_switch: Fact = UNKNOWN
    cards_per_socket: Fact = UNKNOWN
    socket_bytes_per_s: Fact = UNKNOWN


class HostMemory(Record):
    """What a node's processors move from and to their memory, all together, and how many cards share one link
    to them (by themselves where nothing is known)."""

    bytes_per_s: Fact = UNKNOWN
    cards_per_link: Fact = UNKNOWN


class Node(Record):
    """Cards that share one host or one scale-up box.

    `single_host`: several of it are processes on one host rather than several hosts.
    `cards_per_host` is given where one box holds several hosts (a rack of trays).
    """

    id: str
    name: str
    aliases: tuple[str, ...] = ()
    accelerator_id: str
    single_host: bool = False
    cards_per_node: Fact
    cards_per_host: Fact = UNKNOWN
    scale_up: NodeScaleUp
    scale_out: NodeScaleOut
    pcie: PcieTree = PcieTree()
    num_storage_nics: Fact
    host_memory_bytes: Fact
    host_memory: HostMemory = HostMemory()
    local_nvme_bytes: Fact
    num_host_cpus: Fact
    max_power_watts: Fact
    release_year: Fact
    notes: tuple[str, ...] = ()

    @property
    def num_cards(self) -> int:
        return int(self.cards_per_node.require(f"{self.id}: cards_per_node"))


class NetworkLevel(Record):
    """One tier of a cluster's network: it joins `num_children` units of the tier below.

    `link` is a key of `links.json`; the node's own where it is left out.
    """

    name: str
    num_children: Fact
    oversubscription: Fact
    child_bytes_per_s: Fact
    num_switches: Fact = UNKNOWN
    topology: Literal["fat_tree", "rails", "dragonfly"] = "fat_tree"
    in_network_reduction: bool = False
    link: str | None = None
    note: str | None = None


class ClusterEntry(Record):
    """A named cluster: so many of one node, and the tiers above the node from the inside out."""

    id: str
    name: str
    aliases: tuple[str, ...] = ()
    node_id: str
    node_count: Fact
    accelerator_count: Fact
    scale_out_topology: str
    fabric: str | None = None
    levels: tuple[NetworkLevel, ...]
    torus_dims: Dimensions | None = None
    published: dict[str, Fact] = Field(default_factory=dict)
    release_year: Fact


class ProtocolFacts(Record):
    """`hardware_db.Protocol` with its sources."""

    start_s: Fact
    step_s: Fact
    bandwidth_share: Fact


class LinkClass(Record):
    """What links of one technology have in common: times, and the share of line rate that is reached.

    `level_by_level`, `protocols`, `tree_bandwidth_share` and `concurrent_messages` are those of the library
    that drives them (see `hardware_db.Level`); `reduction_start_s` is the start of a reduction in its
    switches, where they can. A message passes each further switch of a network in `switch_latency_s`. A node
    whose cards are unpublished is taken to have the typical ones.
    """

    latency_s: Fact
    efficiency: Fact
    start_s: Fact = UNKNOWN
    protocols: dict[str, ProtocolFacts] = Field(default_factory=dict)
    concurrent_messages: Fact = UNKNOWN
    level_by_level: bool = True
    tree_bandwidth_share: Fact = UNKNOWN
    reduction_start_s: Fact = UNKNOWN
    switch_latency_s: Fact = UNKNOWN
    typical_gbit_per_s_per_card: Fact = UNKNOWN


class CollectiveLibrary(Record):
    """The library through which a vendor's devices communicate. Devices of two libraries form no group."""

    name: str
    source: str
    confidence: Confidence
    note: str | None = None


class ReductionFacts(Record):
    """`hardware_db.InNetworkReduction` of the scale-up switches that these accelerators use."""

    accelerators: tuple[str, ...]
    all_reduce_bytes_per_s: Fact
    start_s: Fact
    min_peers: Fact


class CollectiveTable(Record):
    """A measured table as nccl-tests prints it: payload bytes and bus bandwidth in bytes/s.

    `shape` is that of `hardware_db.MeasuredCollective`. It holds for these accelerators, in these nodes only
    where `nodes` names some.
    """

    id: str
    what: str
    kind: str
    shape: tuple[Annotated[int, Field(ge=2)], ...]
    accelerators: tuple[str, ...]
    nodes: tuple[str, ...] = ()
    source: str
    confidence: Literal["read", "derived"]
    note: str | None = None
    rows: tuple[tuple[float, float], ...]


class CollectiveFacts(Record):
    """What is known of collectives beyond links: reductions in switches, and measured tables."""

    reductions: tuple[ReductionFacts, ...]
    tables: tuple[CollectiveTable, ...]
