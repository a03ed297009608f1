"""Pins: the parts of a plan that the user has decided, or forbidden; the search fills in the rest.

A pin on a module names it by a pattern of its path (`autopar.search.module_patterns`). Where several patterns
cover one module the last counts, so that exceptions follow the rule; what is forbidden stays forbidden.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from autopar.plan import Offload, Parallelism, Recompute, RecomputeMode, ScheduleName
from autopar.search.mesh_degrees import MESH_SETTINGS, MeshDegrees, degrees_of_mesh
from autopar.search.module_patterns import covers
from autopar.search.pin_values import SETTINGS, check_together, check_values, written

if TYPE_CHECKING:
    from autopar.search.axis_problem import Custom
    from autopar.search.pin_stages import HasModules
    from graphs.ir import OpGraph

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Pins:
    """What the user has decided; None, or nothing in it, leaves it to the search.

    Attributes:
        microbatch_size, tp, pp, dp, cp, ep, dp_shard, zero_stage, recompute, schedule, num_virtual_stages,
            sequence_parallel, offload: settings of `autopar.plan.Parallelism`. `recompute` is for the blocks
            that `recompute_modules` does not name.
        mesh: the devices arranged as this mesh. Each axis of it serves one of dp_replicate, dp_shard, cp, tp
            and pp; several may serve the same.
        forbid: values that a setting may not have: `{"zero_stage": {3}, "schedule": {"GPipe"}}`.
        placements: by module or parameter, then by mesh axis, how the parameters lie on it: `Shard(0)`,
            `Replicate`, or the strategy key of the ops that read them; with `!` before it, how they may not.
            Of a module's parameters those that lack the dimension are left free.
        recompute_modules: by block, what its backward computes again: none, selective or full; with `!`
            before it, what it does not.
        cut_before: modules with which a pipeline stage must begin.
        keep_together: modules that stay on one stage; `a + b` keeps two, and what is between them.

    Raises PinConflictError for values that do not exist, and for pins that exclude each other on every model
    and every cluster; `autopar.search.pin_conflicts` knows of those that do so on one.
    """

    microbatch_size: int | None = None
    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    cp: int | None = None
    ep: int | None = None
    dp_shard: int | None = None
    zero_stage: int | None = None
    recompute: Recompute | None = None
    schedule: ScheduleName | None = None
    num_virtual_stages: int | None = None
    sequence_parallel: bool | None = None
    offload: Offload | None = None
    mesh: tuple[int, ...] | None = None
    forbid: Mapping[str, Collection[object]] = field(default_factory=dict)
    placements: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    recompute_modules: Mapping[str, str] = field(default_factory=dict)
    cut_before: tuple[str, ...] = ()
    keep_together: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        forbid = {name: frozenset(values) for name, values in self.forbid.items() if values}
        object.__setattr__(self, "forbid", forbid)
        placements = {path: by_axis for path, by_axis in self.placements.items() if by_axis}
        object.__setattr__(self, "placements", placements)
        check_values(self)
        check_together(self)

    @classmethod
    def load(cls, path: str | Path) -> Pins:
        """The pins of a YAML or JSON file, whose keys are the attributes. Raises PinConflictError."""
        return cls.merged(path)

    @classmethod
    def merged(
        cls, source: Pins | Mapping[str, object] | str | Path | None = None, **settings: object
    ) -> Pins:
        """The pins of `source` (pins, a mapping as in a file, the path of a file, or nothing), and
        `settings`, which go before; a setting that is None is not given.

        Mappings are merged key by key, and what is cut or kept together is added. Where one side pins what
        the other forbids, it is as `settings` say.
        """
        from autopar.search.pin_file import merged_fields, parse_pins, read_pins

        if isinstance(source, Pins):
            base = {each.name: getattr(source, each.name) for each in fields(cls)}
        elif isinstance(source, Mapping):
            base = parse_pins(source, cls)
        else:
            base = {} if source is None else read_pins(Path(source), cls)
        return cls(**merged_fields(base, parse_pins(settings, cls)))

    def values(self, name: str, usual: Iterable[T]) -> tuple[T, ...]:
        """The values of a setting that are left to try: the one that is pinned, else the `usual` ones; of
        them what neither a ban nor the mesh excludes."""
        pinned = getattr(self, name, None)
        tried = usual if pinned is None else (cast(T, pinned),)
        if self.mesh is not None and name in MESH_SETTINGS:
            left = {getattr(degrees, name) for degrees in degrees_of_mesh(self.mesh)}
            tried = [value for value in tried if value in left]
        banned = self.forbid.get(name, ())
        return tuple(value for value in tried if value not in banned)

    def admits(self, p: Parallelism) -> bool:
        """Whether a parallelism agrees with the settings, the bans and the mesh.

        A schedule means nothing without a pipeline, nor sequence parallelism without a tensor axis: any pin
        on them then holds. What is computed again is no matter of the whole, see `recompute_values`.
        """
        for name, values, is_wanted in self._tests:
            is_idle = (name == "schedule" and p.pp == 1) or (name == "sequence_parallel" and p.tp == 1)
            if not is_idle and (getattr(p, name) in values) != is_wanted:
                return False
        return self.mesh is None or MeshDegrees.of(p) in degrees_of_mesh(self.mesh)

    @cached_property
    def _tests(self) -> tuple[tuple[str, Collection[object], bool], ...]:
        """Settings, values, and whether it has to be one of them."""
        pinned = {name: getattr(self, name) for name in SETTINGS if name != "recompute"}
        wanted = ((name, (value,), True) for name, value in pinned.items() if value is not None)
        banned = ((name, values, False) for name, values in self.forbid.items() if name != "recompute")
        return (*wanted, *banned)

    def rule(self, graph: OpGraph, axis: str) -> Custom | None:
        """What the pinned placements leave of the strategies on a mesh axis, for the `AxisProblem` of a
        graph; None where everything is left."""
        from autopar.search.pin_rules import rule_of

        return rule_of(self, graph, axis)

    def recompute_of(self, path: str) -> RecomputeMode | None:
        """What the backward of a block computes again, where that is pinned."""
        found = [mode for mode in self._modes_of(path) if not mode.startswith("!")]
        return cast("RecomputeMode | None", found[-1] if found else self.recompute)

    def recompute_values(self, path: str, usual: Iterable[str]) -> tuple[str, ...]:
        """The ways to compute a block again that are left to try: the pinned one, else those of the `usual`
        that are not forbidden; none where what is pinned is forbidden to this block."""
        mode = self.recompute_of(path)
        banned = {text.removeprefix("!") for text in self._modes_of(path) if text.startswith("!")}
        if mode is None:
            return tuple(name for name in usual if name not in banned | {*self.forbid.get("recompute", ())})
        return () if mode in banned else (mode,)

    def _modes_of(self, path: str) -> list[str]:
        """All that is asked of what a block computes again."""
        return [mode for pattern, mode in self.recompute_modules.items() if covers(pattern, path)]

    def must_cut(self, units: Sequence[HasModules]) -> tuple[int, ...]:
        """The units with which a stage must begin (`autopar.search.pin_stages`)."""
        from autopar.search.pin_stages import must_cut

        return must_cut(self, units)

    def may_cut(self, units: Sequence[HasModules]) -> tuple[int, ...]:
        """The units with which a stage may begin, the first, which always does, left out."""
        from autopar.search.pin_stages import may_cut

        return may_cut(self, units)

    def parts(self) -> Iterator[tuple[str, Pins]]:
        """Every single pin in words, with the pins that are left without it."""
        for name in (*SETTINGS, "mesh"):
            if getattr(self, name) is not None:
                yield f"{name}={written(getattr(self, name))}", self._with(**{name: None})
        for name, values in self.forbid.items():
            for value in sorted(values, key=str):
                left = frozenset(values) - {value}
                yield f"forbid {name}={value}", self._with(forbid={**self.forbid, name: left})
        for path, by_axis in self.placements.items():
            for axis, placement in by_axis.items():
                kept = {path: {other: by_axis[other] for other in by_axis if other != axis}}
                yield f"{path}:{axis}={placement}", self._with(placements={**self.placements, **kept})
        for path, mode in self.recompute_modules.items():
            modes = {key: value for key, value in self.recompute_modules.items() if key != path}
            yield f"recompute {path}={mode}", self._with(recompute_modules=modes)
        for name, text in (("cut_before", "cut before {}"), ("keep_together", "keep {} together")):
            paths = getattr(self, name)
            for path in paths:
                yield text.format(path), self._with(**{name: tuple(p for p in paths if p != path)})

    def _with(self, **changes: Any) -> Pins:
        return replace(self, **changes)

    def __bool__(self) -> bool:
        """Whether anything is pinned."""
        return any(True for _ in self.parts())

    def __str__(self) -> str:
        return ", ".join(text for text, _ in self.parts()) or "nothing pinned"
