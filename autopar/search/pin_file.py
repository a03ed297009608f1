"""Pins as YAML, JSON or a mapping, and how those of the command line go before those of a file.

    tp: 8
    mesh: 8x8
    forbid: {zero_stage: 3, schedule: [GPipe, LoopedBFS]}
    placements:
      model.layers.*.mlp.down_proj: {tp: Shard(1)}
      lm_head: {tp: "!Replicate"}
    recompute_modules: {"model.layers.[0-3]": full}
    cut_before: [model.layers.16]
    keep_together: [model.norm + lm_head]

YAML gives `*` and `!` at the start of a word, and `[`, a meaning of their own: such words stand in quotes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from autopar.errors import PinConflictError
from hardware_db.errors import did_you_mean

if TYPE_CHECKING:
    from autopar.search.pins import Pins

Fields = dict[str, Any]
"""Arguments of `Pins` by name."""


def read_pins(path: Path, form: type[Pins]) -> Fields:
    """The pins of a file; PinConflictError names file and key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PinConflictError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        document: object = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise PinConflictError(f"{path}: is not valid JSON: {error}") from error
    except yaml.YAMLError as error:
        raise PinConflictError(
            f"{path}: is not valid YAML: {error}; put what begins with *, [ or ! in quotes"
        ) from error
    return parse_pins({} if document is None else document, form, origin=str(path))


def parse_pins(document: object, form: type[Pins], origin: str = "pins") -> Fields:
    """The pins of a loaded document; `origin` opens each message. What is None was not given."""
    if not isinstance(document, Mapping):
        raise PinConflictError(f"{origin}: expected settings such as `tp: 8`, got {document!r}")
    known = [each.name for each in fields(form)]
    found: Fields = {}
    for key, value in document.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise PinConflictError(f"{origin}: {key}: unknown pin{did_you_mean(name, known)}")
        if value is not None:
            found[name] = _FORMS.get(name, _as_it_is)(value, f"{origin}: {name}")
    return found


def parse_mesh(value: object, where: str = "mesh") -> tuple[int, ...]:
    """`8x8`, a number, or a list of numbers."""
    sizes = value.split("x") if isinstance(value, str) else _several(value)
    try:
        return tuple(int(str(size)) for size in sizes)
    except ValueError:
        raise PinConflictError(
            f"{where}: got {value!r}, expected the sizes of its axes, such as 8x8"
        ) from None


def merged_fields(base: Fields, over: Fields) -> Fields:
    """Both, `over` going before: what it forbids is no longer pinned, what it pins no longer forbidden."""
    found = {**base, **over}
    banned_before, banned = base.get("forbid", {}), over.get("forbid", {})
    for name, values in banned.items():
        if name not in over and found.get(name) in values:
            found.pop(name, None)
    found["forbid"] = {
        name: (frozenset(banned_before.get(name, ())) - {over.get(name)}) | frozenset(banned.get(name, ()))
        for name in dict.fromkeys((*banned_before, *banned))
    }
    for name in ("cut_before", "keep_together"):
        found[name] = tuple(dict.fromkeys((*base.get(name, ()), *over.get(name, ()))))
    found["recompute_modules"] = _later(base.get("recompute_modules", {}), over.get("recompute_modules", {}))
    before, after = base.get("placements", {}), over.get("placements", {})
    found["placements"] = _later(before, {path: {**before.get(path, {}), **after[path]} for path in after})
    return found


def _later(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Both, with `after` last, since of several patterns the last counts."""
    return {**{path: value for path, value in before.items() if path not in after}, **after}


def _as_it_is(value: object, where: str) -> object:
    if isinstance(value, Mapping | list):
        raise PinConflictError(f"{where}: got {value!r}, expected one value; forbid takes several")
    return value


def _mapping(value: object, where: str, example: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise PinConflictError(f"{where}: got {value!r}, expected a mapping such as {example}")
    return value


def _forbid(value: object, where: str) -> dict[str, frozenset[object]]:
    found = _mapping(value, where, "{zero_stage: 3}")
    return {str(name).replace("-", "_"): frozenset(_several(values)) for name, values in found.items()}


def _several(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)


def _placements(value: object, where: str) -> dict[str, dict[str, str]]:
    found = _mapping(value, where, "{lm_head: {tp: Shard(0)}}")
    return {
        str(path): {
            str(axis): str(placement)
            for axis, placement in _mapping(by_axis, f"{where}: {path}", "{tp: Shard(0)}").items()
        }
        for path, by_axis in found.items()
    }


def _modes(value: object, where: str) -> dict[str, str]:
    found = _mapping(value, where, "{model.layers.0: full}")
    return {str(path): str(mode) for path, mode in found.items()}


def _paths(value: object, where: str) -> tuple[str, ...]:
    if not all(isinstance(path, str) for path in _several(value)):
        raise PinConflictError(f"{where}: got {value!r}, expected module paths")
    return tuple(map(str, _several(value)))


_FORMS: Mapping[str, Callable[[object, str], object]] = {
    "mesh": parse_mesh,
    "forbid": _forbid,
    "placements": _placements,
    "recompute_modules": _modes,
    "cut_before": _paths,
    "keep_together": _paths,
}
