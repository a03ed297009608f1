"""A user's own cluster, in YAML or JSON.

Levels by hand, innermost first. `devices` counts the devices in one group of a level, all inner levels
included:

    name: my-lab
    device: a100-80gb
    levels:
      - {name: nvlink, devices: 8, bandwidth_bytes_per_s: 300e9, latency_s: 5e-6, efficiency: 0.8}
      - {name: infiniband, devices: 64, bandwidth_bytes_per_s: 25e9, latency_s: 10e-6}

or nodes from the database, with what is different about yours:

    node: dgx-a100
    count: 8
    scale_out_bytes_per_s_per_device: 12.5e9

`bandwidth_bytes_per_s` is per device and one direction; `efficiency` (default 1) is the share of it that
large collectives reach, `oversubscription` (default 1) divides it, `topology` is one of those of
`hardware_db.Level` (default switch). A level also takes what `Level` documents: `alone_bytes_per_s`,
`start_s`, `protocols`, `concurrent_messages`, `level_by_level` (default: as the device's library does),
`tree_bandwidth_share`, `in_network_reduction`, and tables that you measured, as (payload bytes, seconds) over
so many peers on each level:

    measured:
      - {kind: all_reduce, shape: [8], points: [[1e6, 46e-6], [16e6, 134e-6], [1e9, 4.05e-3]]}

`device` is an id or a device of your own:

    device:
      name: prototype
      memory_bytes: 64e9
      memory_bandwidth_bytes_per_s: 2e12
      peak_flops_per_s: {bf16: 400e12, fp32: 50e12}
      efficiency: {matmul: 0.6}

`profile` names a file that `autopar calibrate` wrote on such a machine, relative to this file. What was
measured replaces what is published, rates of links included; the first form then needs no `device`.

Both forms also take `name`, `efficiency` (the numbers of `hardware_db.Efficiency`),
`price_usd_per_device_hour` and a device's part of its host, which offloading needs:
`host_memory_bytes_per_device`, `host_memory_bytes_per_s_per_device` and `host_link_bytes_per_s_per_device`;
the first also `devices_per_node` (default: the devices of its innermost level).

Several pools of different devices are in a file of `hardware_db.pool_file`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from hardware_db import catalog
from hardware_db.build import cluster_of_nodes
from hardware_db.calibration import accelerator_of, calibrated
from hardware_db.cluster_form import TAGS, DeviceForm, Form, LevelForm, LevelsForm, NodeForm, form_at
from hardware_db.errors import ClusterFileError, HardwareError, did_you_mean
from hardware_db.facts import Record
from hardware_db.level import library_of
from hardware_db.machine import Cluster
from hardware_db.profile import Profile, load_profile
from hardware_db.schema import Accelerator

F = TypeVar("F", bound=Record)
_PER_DEVICE: Final = (
    "host_memory_bytes_per_device",
    "host_memory_bytes_per_s_per_device",
    "host_link_bytes_per_s_per_device",
    "price_usd_per_device_hour",
)
"""Fields of a `Cluster` that both forms give under the same name."""


def load_cluster(path: Path) -> Cluster:
    """The cluster that a .yaml, .yml or .json file describes; a ClusterFileError names file and field."""
    document = read_document(path)
    return parse_cluster(document, origin=str(path), default_name=path.stem, folder=path.parent)


def read_document(path: Path) -> object:
    """What a .yaml, .yml or .json file holds; raises ClusterFileError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ClusterFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        document: object = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ClusterFileError(f"{path}: is not valid {path.suffix.lstrip('.').upper()}: {error}") from error
    return document


def parse_cluster(
    document: object, *, origin: str = "cluster", default_name: str = "custom", folder: Path = Path()
) -> Cluster:
    """The cluster in an already loaded document; `origin` opens each error message, `folder` is where a
    profile is looked for."""
    if not isinstance(document, Mapping):
        raise ClusterFileError(
            f"{origin}: expected fields such as `device` and `levels`, got {_shown(document)}"
        )
    if "pools" in document:
        raise ClusterFileError(
            f"{origin}: has several `pools` and is no single cluster; hardware_db.cluster_or_pools reads it"
        )
    if "node" in document and "levels" in document:
        raise ClusterFileError(
            f"{origin}: has both `node` and `levels`; give `node` and `count`, or `device` and `levels`"
        )
    if not {"node", "device", "levels"} & set(document):
        fields = ", ".join(map(str, document)) or "none"
        raise ClusterFileError(
            f"{origin}: expected `node`, or `device` and `levels`, got the fields {fields}"
        )
    try:
        if "node" in document:
            return _from_nodes(validated(NodeForm, document, origin), default_name, folder)
        return _from_levels(validated(LevelsForm, document, origin), default_name, folder)
    except ClusterFileError:
        raise
    except HardwareError as error:
        raise ClusterFileError(f"{origin}: {error}") from error


def cluster_document(cluster: Cluster) -> dict[str, object]:
    """The document, in the first form, that `parse_cluster` turns back into the same machine."""
    document: dict[str, object] = {
        "name": cluster.id,
        "device": _device_document(cluster.device),
        "devices_per_node": cluster.devices_per_node,
        "levels": [LevelForm.document(level) for level in cluster.levels],
    }
    known = {name: getattr(cluster, name) for name in _PER_DEVICE}
    return document | {name: value for name, value in known.items() if value is not None}


def _device_document(device: Accelerator) -> str | dict[str, object]:
    card = catalog.find_accelerator(device.id)
    if card is not None and card.logical_device() == device:
        return card.id
    peaks = {
        dtype: fact.value for dtype, fact in device.peak_dense_flops_per_s.items() if fact.value is not None
    }
    return {
        "name": device.name,
        "vendor": device.vendor,
        "kind": device.kind,
        "memory_bytes": device.memory_bytes,
        "memory_bandwidth_bytes_per_s": device.memory_bandwidth_bytes_per_s,
        "peak_flops_per_s": peaks,
        "efficiency": device.efficiency.model_dump(),
    }


def _from_levels(form: LevelsForm, default_name: str, folder: Path) -> Cluster:
    profile = _profile(form, folder)
    if form.device is not None:
        card = _device(form.device)
    elif profile is not None:
        card = accelerator_of(profile)
    else:
        raise HardwareError("device: is missing")
    name = form.name or default_name
    levels = tuple(level.level(library_of(card).level_by_level) for level in form.levels)
    price = card.price_usd_per_card_hour
    cluster = Cluster(
        id=name,
        name=name,
        device=card.logical_device(),
        num_devices=levels[-1].num_devices,
        devices_per_node=form.devices_per_node or levels[0].num_devices,
        levels=levels,
        price_usd_per_device_hour=None if price is None else price / card.logical_devices_per_card,
    )
    return _overridden(cluster, form, profile)


def _from_nodes(form: NodeForm, default_name: str, folder: Path) -> Cluster:
    node = catalog.node(form.node)
    cluster = cluster_of_nodes(
        node,
        form.count,
        card=None if form.device is None else _device(form.device, catalog.accelerator(node.accelerator_id)),
        scale_out_bytes_per_s_per_device=form.scale_out_bytes_per_s_per_device,
        oversubscription=form.oversubscription,
    )
    name = form.name or default_name
    return _overridden(replace(cluster, id=name, name=name), form, _profile(form, folder))


def _profile(form: Form, folder: Path) -> Profile | None:
    return None if form.profile is None else load_profile(folder / form.profile)


def _overridden(cluster: Cluster, form: Form, profile: Profile | None) -> Cluster:
    if profile is not None:
        cluster = calibrated(cluster, profile)
    return replace(
        cluster,
        device=cluster.device.with_efficiency(form.efficiency.facts()),
        **{name: value for name in _PER_DEVICE if (value := getattr(form, name)) is not None},
    )


def _device(device: str | DeviceForm, links: Accelerator | None = None) -> Accelerator:
    return catalog.accelerator(device) if isinstance(device, str) else device.accelerator(links)


def validated(form: type[F], document: Mapping[object, object], origin: str) -> F:
    """The document as a form; a ClusterFileError has a line, opened by `origin`, for each mistake."""
    try:
        return form.model_validate(document)
    except ValidationError as error:
        lines = [_sentence(form, problem) for problem in error.errors()]
        raise ClusterFileError("\n".join(f"{origin}: {line}" for line in dict.fromkeys(lines))) from None


def _sentence(form: type[Record], problem: ErrorDetails) -> str:
    """One problem in one line: the field, what was found, what was expected."""
    where = [step for step in problem["loc"] if step not in TAGS]
    field = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in where).lstrip(".")
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field{did_you_mean(str(where[-1]), form_at(form, where[:-1]).model_fields)}"
    if problem["type"] == "missing":
        return f"{field}: is missing"
    expected = problem["msg"].removeprefix("Input should be ")
    return f"{field}: got {_shown(problem['input'])}, expected {expected}"


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
