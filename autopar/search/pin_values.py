"""Which values pins may have, and which of them exclude each other whatever the model and the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, NoReturn, get_args

from autopar.errors import PinConflictError
from autopar.plan import Parallelism
from autopar.search.mesh_degrees import MESH_SETTINGS, degrees_of_mesh
from autopar.search.module_patterns import check_pattern
from autopar.search.pin_placement import PINNED_AXES, PinnedPlacement
from costmodel import CostModelError
from costmodel.orders import check_schedule
from hardware_db.errors import did_you_mean

if TYPE_CHECKING:
    from autopar.search.pins import Pins

SETTINGS = (
    "microbatch_size", "tp", "pp", "dp", "cp", "ep", "dp_shard", "zero_stage", "recompute", "schedule",
    "num_virtual_stages", "sequence_parallel", "offload",
)  # fmt: skip
"""The settings that can be pinned to one value."""

FORBIDDABLE = ("dp", *(name for name in Parallelism.model_fields if name != "axis_order"))
"""The settings of which values can be forbidden."""

BLOCK_MODES = ("none", "selective", "full")
"""What can be asked of a block's backward."""


def written(value: object) -> str:
    """A value as it is written in a pin: a mesh as `8x8`."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def choices(setting: str) -> tuple[object, ...]:
    """All values of a setting, none where it is a count."""
    if setting == "recompute":
        return BLOCK_MODES
    if setting == "sequence_parallel":
        return True, False
    field = Parallelism.model_fields.get(setting)
    return () if field is None else get_args(field.annotation)


def check_values(pins: Pins) -> None:
    """Raises PinConflictError for a value that its setting cannot have, and for what is no pin at all."""
    for name in SETTINGS:
        value = getattr(pins, name)
        if value is not None:
            _check_value(name, value)
    for size in pins.mesh or ():
        _check_value("mesh axis", size)
    for name, values in pins.forbid.items():
        if name not in FORBIDDABLE:
            meant = did_you_mean(name, FORBIDDABLE) or f"; settings are {_listed(FORBIDDABLE)}"
            raise PinConflictError(f"forbid {name}: unknown setting{meant}")
        for value in values:
            _check_value(name, value)
        if set(choices(name)) and set(choices(name)) <= set(values):
            raise PinConflictError(f"every {name} is forbidden: {_listed(choices(name))}; allow one of them")
    for path, by_axis in pins.placements.items():
        check_pattern(path)
        for axis, text in by_axis.items():
            if axis not in PINNED_AXES:
                raise PinConflictError(
                    f"{path}:{axis}={text}: placements are decided on the axis {', '.join(PINNED_AXES)}; on "
                    "the data axes zero_stage and dp_shard say what is split"
                )
            PinnedPlacement.parse(path, axis, text)
    for path, mode in pins.recompute_modules.items():
        check_pattern(path)
        if mode.removeprefix("!") not in BLOCK_MODES:
            _unknown(f"recompute {path}", mode, BLOCK_MODES)
    for path in (*pins.cut_before, *(part for paths in pins.keep_together for part in together(paths))):
        check_pattern(path)


def together(paths: str) -> tuple[str, ...]:
    """The patterns of one entry of `keep_together`."""
    return tuple(part.strip() for part in paths.split("+"))


def _check_value(name: str, value: object) -> None:
    known = choices(name)
    if not known:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PinConflictError(
                f"{name}={value} is not a count; give 1 or more, or leave it to the search"
            )
    elif not any(value is choice or (type(value) is type(choice) and value == choice) for choice in known):
        _unknown(name, value, known)


def _unknown(name: str, value: object, known: tuple[object, ...]) -> NoReturn:
    meant = did_you_mean(str(value), map(str, known))
    raise PinConflictError(f"{name}={value} is unknown; choose one of {_listed(known)}{meant}")


def _listed(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values))


def check_together(pins: Pins) -> None:
    """Raises PinConflictError for pins that exclude each other."""
    for name, values in pins.forbid.items():
        if getattr(pins, name, None) in values:
            raise PinConflictError(f"{name}={getattr(pins, name)} is pinned and forbidden; drop either")
    if pins.pp == 1 and (pins.num_virtual_stages or 1) > 1:
        raise PinConflictError(
            f"num_virtual_stages={pins.num_virtual_stages} needs a pipeline, but pp=1; raise pp, or drop it"
        )
    if pins.pp == 1 and pins.cut_before:
        raise PinConflictError(f"cut_before {pins.cut_before[0]} needs at least 2 stages, but pp=1")
    if pins.zero_stage == 0 and (pins.dp_shard or 1) > 1:
        raise PinConflictError(
            f"dp_shard={pins.dp_shard} shards the training state, but zero_stage=0 does not; drop either"
        )
    if pins.dp is not None and pins.dp_shard is not None and pins.dp % pins.dp_shard:
        raise PinConflictError(f"dp_shard={pins.dp_shard} does not divide dp={pins.dp}")
    if pins.schedule is not None and pins.num_virtual_stages is not None and pins.pp != 1:
        _check_virtual(pins.schedule, pins.pp or 2, pins.num_virtual_stages)
    if pins.mesh is not None:
        _check_mesh(pins.mesh, {name: getattr(pins, name, None) for name in MESH_SETTINGS})


def _check_virtual(schedule: str, pp: int, num_virtual_stages: int) -> None:
    """With microbatches enough: how many there are is not known here."""
    try:
        check_schedule(schedule, pp, 2 * pp * num_virtual_stages, num_virtual_stages)
    except CostModelError as error:
        raise PinConflictError(
            f"schedule={schedule} and num_virtual_stages={num_virtual_stages} exclude each other: {error}"
        ) from None


def _check_mesh(mesh: tuple[int, ...], settings: Mapping[str, int | None]) -> None:
    pinned = {name: value for name, value in sorted(settings.items()) if value is not None}
    possible = degrees_of_mesh(mesh)
    for name, value in pinned.items():
        found = sorted({getattr(degrees, name) for degrees in possible})
        if value not in found:
            raise PinConflictError(
                f"{name}={value} is no product of axes of the mesh {written(mesh)}; "
                f"these are {_listed(tuple(found))}"
            )
    if not any(
        all(getattr(degrees, name) == value for name, value in pinned.items()) for degrees in possible
    ):
        degrees = ", ".join(f"{name}={value}" for name, value in pinned.items())
        raise PinConflictError(
            f"no way to give the axes of the mesh {written(mesh)} their roles has {degrees}: "
            f"it is {prod(mesh)} devices, and every axis serves one role"
        )
