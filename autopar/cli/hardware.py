"""`autopar hardware`: what machines are known, and what is known of one, with sources."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from pydantic import BaseModel

import hardware_db
from autopar.report import units
from autopar.report.table import table
from hardware_db import Accelerator, Cluster, Dimensions, Fact, HardwareError, Node, UnknownHardwareError


def show(id: str | None, format: str) -> str:
    """The list of all machines, or one of them, as "text" or "json"; raises HardwareError."""
    if id is None:
        return _json_lists() if format == "json" else _lists()
    record = _find(id)
    if format == "json":
        return _json(record)
    return "\n".join(_machine(record) if isinstance(record, Cluster) else _record(record)) + "\n"


def _find(id: str) -> Accelerator | Node | Cluster:
    """An accelerator, a node (its bare id) or else a cluster."""
    for lookup in (hardware_db.accelerator, hardware_db.node):
        try:
            return lookup(id)
        except UnknownHardwareError:
            continue
    return hardware_db.cluster(id)


def _lists() -> str:
    sections = [
        ("accelerators", ("id", "memory", "bandwidth", "peak (dense)", "name"), _accelerator_rows()),
        ("nodes (a cluster is NODE*COUNT)", ("id", "devices", "accelerator", "", "name"), _node_rows()),
        ("named clusters", ("id", "devices", "device", "", "name"), _cluster_rows()),
    ]
    blocks = ["\n".join([title, *table([head, *rows])]) for title, head, rows in sections]
    return "\n\n".join(blocks) + "\n"


def _accelerator_rows() -> Iterable[Sequence[str]]:
    for id in hardware_db.accelerators():
        card = hardware_db.accelerator(id)
        memory, bandwidth = card.memory.capacity_bytes.value, card.memory.bandwidth_bytes_per_s.value
        yield (
            id,
            "-" if memory is None else units.gigabytes(memory),
            "-" if bandwidth is None else units.bytes_per_s(bandwidth),
            _peak(card),
            card.name,
        )


def _peak(card: Accelerator) -> str:
    for dtype in ("bf16", "fp16", "fp32"):
        fact = card.peak_dense_flops_per_s.get(dtype)
        if fact is not None and fact.value is not None:
            return f"{units.flops_per_s(fact.value)} {dtype}"
    return "-"


def _node_rows() -> Iterable[Sequence[str]]:
    for id in hardware_db.nodes():
        node = hardware_db.node(id)
        cards = node.cards_per_node.value
        yield (id, "-" if cards is None else f"{cards:g}", node.accelerator_id, "", node.name)


def _cluster_rows() -> Iterable[Sequence[str]]:
    for id in hardware_db.clusters():
        try:
            cluster = hardware_db.cluster(id)
        except HardwareError as error:
            yield (id, "-", "-", "", f"cannot be planned for: {error}")
        else:
            yield (id, f"{cluster.num_devices:,}", cluster.device.id, "", cluster.name)


def _record(record: Accelerator | Node) -> list[str]:
    """Every known fact of a record with its source, then the notes."""
    facts = [(path, fact) for path, fact in hardware_db.facts_of(record) if fact.value is not None]
    unknown = [path for path, fact in hardware_db.facts_of(record) if fact.value is None]
    used: dict[str, int] = {}
    rows = [("fact", "value", "confidence", "source")]
    for path, fact in facts:
        number = used.setdefault(fact.source or "", len(used) + 1)
        rows.append((path, _value(fact), fact.confidence or "", f"[{number}]"))
    lines = [f"{record.id}: {record.name}", *table(rows)]
    if unknown:
        lines += ["", "not known: " + ", ".join(unknown)]
    lines += ["", "sources"]
    for source, number in used.items():
        document = hardware_db.sources().get(source)
        where = f", {document.locator}" if document and document.locator else ""
        lines.append(f"  [{number}] {document.title if document else source}{where}")
    return [*lines, *(f"note: {note}" for note in record.notes)]


def _value(fact: Fact | Dimensions) -> str:
    if isinstance(fact, Dimensions):
        return " x ".join(map(str, fact.value))
    assert fact.value is not None
    return f"{fact.value:.6g}"


def _machine(cluster: Cluster) -> list[str]:
    """What the planner sees of a cluster."""
    device = cluster.device
    memory, bandwidth = (
        units.gigabytes(device.memory_bytes),
        units.bytes_per_s(device.memory_bandwidth_bytes_per_s),
    )
    rows = [
        ("devices", f"{cluster.num_devices:,} x {device.id}, {cluster.devices_per_node} in a node"),
        (
            "memory",
            f"{memory} at {bandwidth}",
        ),
        ("peak", _peak(device)),
    ]
    levels = [("level", "devices", "bandwidth per device", "latency", "topology")]
    levels += [
        (
            level.name,
            f"{level.num_devices:,}",
            units.bytes_per_s(level.bandwidth_bytes_per_s),
            units.seconds(level.latency_s),
            level.topology,
        )
        for level in cluster.levels
    ]
    notes = [f"note: {note}" for note in cluster.notes]
    head = f"{cluster.id}: {cluster.name}"
    return [head, *table(rows), "", "links, innermost first (one direction)", *table(levels), *notes]


def _json_lists() -> str:
    lists = {
        "accelerators": hardware_db.accelerators(),
        "nodes": hardware_db.nodes(),
        "clusters": hardware_db.clusters(),
    }
    return json.dumps(lists, indent=2) + "\n"


def _json(record: Accelerator | Node | Cluster) -> str:
    content: object
    if isinstance(record, BaseModel):
        content = record.model_dump(mode="json", exclude_none=True)
    else:
        content = hardware_db.cluster_document(record)
    return json.dumps(content, indent=2) + "\n"
