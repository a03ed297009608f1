"""What a rank keeps of a run of ops from forward to backward, and the most that it holds meanwhile.

Of what backwards need (`autopar.search.needs`), memory-bound ops that share a kernel keep the cheapest values
from which the kernel's backward can compute the others again: of a chain for GELU its input, of a norm the
same.

The most that is held follows from the time line of one forward and one backward, in which every value,
whatever is kept, and every gradient lives from one op to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from autopar.plan import RecomputeMode
from autopar.search.cut import cheapest_cut
from autopar.search.needs import Needs, is_loss

MODES: tuple[RecomputeMode, ...] = get_args(RecomputeMode)

Again = Mapping[str, tuple[bool, ...]]
"""Which ops of a run the backward runs again under each mode."""

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Saved:
    """What a unit keeps from forward to backward: storages by name, so that a stage counts each once.

    `peak_bytes` is the most that it holds, in its forward or its backward (`phase`), what it keeps included.
    """

    storages: Mapping[str, int]
    internal_bytes: int = 0
    peak_bytes: int = 0
    phase: Phase = "backward"
    _divided: dict[int, Saved] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes kept."""
        return sum(self.storages.values()) + self.internal_bytes

    @property
    def working_bytes(self) -> int:
        """What is held at most beside what is kept."""
        return max(0, self.peak_bytes - self.num_bytes)

    def renamed(self, rename: Callable[[str], str]) -> Saved:
        """The same with storages under other names."""
        storages = {rename(name): size for name, size in self.storages.items()}
        return Saved(storages, self.internal_bytes, self.peak_bytes, self.phase)

    def divided(self, degree: int) -> Saved:
        """What is left of it on one of so many ranks that share it: made once, as many bounds ask for it."""
        if degree not in self._divided:
            storages = {name: size // degree for name, size in self.storages.items()}
            others = self.internal_bytes // degree, self.peak_bytes // degree
            self._divided[degree] = Saved(storages, *others, self.phase)
        return self._divided[degree]


class SavedByName(Mapping[str, Saved]):
    """What a unit keeps under each of its `names`, which `make` works out when it is asked for: units are
    many, and of each few names are looked at."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Saved]) -> None:
        self._names = dict.fromkeys(names)
        self._make = make
        self._made: dict[str, Saved] = {}

    def __getitem__(self, name: str) -> Saved:
        if name not in self._made:
            if name not in self._names:
                raise KeyError(name)
            self._made[name] = self._make(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def saved_by_unit(
    needs: Needs, start: int, stop: int, *, is_block: bool
) -> tuple[Again, Mapping[str, Saved]]:
    """What ops `[start, stop)` run again and what they keep under each mode; only blocks recompute."""
    run = _Run(needs, start, stop)
    if not is_block:
        modes: Sequence[str] = MODES
        return dict.fromkeys(modes, (False,) * (stop - start)), dict.fromkeys(modes, run.everything())
    again: Again = {mode: run.again(mode) for mode in MODES}
    return again, run.by_mode(again)


def _parent(module: str) -> str:
    return module.rpartition(".")[0]


class _Run:
    """One run of ops; ops are numbered from its first."""

    def __init__(self, facts: Needs, start: int, stop: int) -> None:
        self.all = facts
        self.start = start
        self.ops = facts.graph.ops[start:stop]
        self.kinds = facts.kinds[start:stop]
        self.made = {
            name: index
            for index, op in enumerate(self.ops)
            for name in op.outputs
            if facts.homes[name] == name
        }
        self.kernel = self._kernels()
        self.place = self._places()
        self.registers = {name for name in self.made if self._is_in_registers(name)}
        self.needs = [facts.need(op) for op in self.ops]
        self.needed_by = self._needed_by()
        self.internal_bytes = sum(need.internal_bytes for need in self.needs)

    def _kernels(self) -> list[int]:
        """The kernel of each op, numbered by its first op.

        Memory-bound ops share one if one reads what the other makes and no other kind of op stands between
        them, and they belong to one module, or to a module and one inside it, unless any chain is fused.
        """
        kernel = list(range(len(self.ops)))
        level: dict[str, int] = {}
        for index, op in enumerate(self.ops):
            homes = dict.fromkeys(self.all.homes[name] for name in op.inputs)
            height = max(
                (level.get(home, 0) for home in homes if self.all.tensors[home].requires_grad), default=0
            )
            if self.kinds[index] == "memory":
                for home in homes:
                    before = self.made.get(home)
                    if before is not None and level[home] == height and self._may_share(before, index):
                        joined = {kernel[before], kernel[index]}
                        kernel = [min(joined) if number in joined else number for number in kernel]
            elif self.kinds[index] != "view":
                height += 1
            level.update((name, height) for name in op.outputs if name in self.made)
        return kernel

    def _may_share(self, maker: int, reader: int) -> bool:
        fusion = self.all.software.fusion
        if self.kinds[maker] != "memory" or fusion == "none":
            return False
        if is_loss(self.ops[reader]) and not self.all.software.fused_loss:
            return False
        one, other = self.ops[maker].module, self.ops[reader].module
        return fusion == "chain" or one == other or _parent(one) == other or _parent(other) == one

    def _places(self) -> list[int]:
        """When each op runs: a kernel runs where its last op stands."""
        last = {number: index for index, number in enumerate(self.kernel)}
        return [last[number] for number in self.kernel]

    def _is_in_registers(self, name: str) -> bool:
        """Whether a value never leaves the kernel that makes it."""
        own = self.kernel[self.made[name]]
        readers = self.all.readers.get(name, frozenset())
        inside = range(self.start, self.start + len(self.ops))
        return (
            bool(readers)
            and name not in self.all.outputs
            and all(index in inside and self.kernel[index - self.start] == own for index in readers)
        )

    def _needed_by(self) -> dict[str, int]:
        """The storages that are kept, each with the first op whose backward reads it."""
        found: dict[str, int] = {}
        missing: dict[int, dict[str, int]] = {}
        for index, need in enumerate(self.needs):
            for name in need.storages:
                if name in self.registers:
                    missing.setdefault(self.kernel[index], {}).setdefault(name, index)
                else:
                    found.setdefault(name, index)
        for wanted in missing.values():
            for name in self._cheapest(wanted, found):
                found[name] = min(found.get(name, len(self.ops)), *wanted.values())
        return found

    def _cheapest(self, wanted: Mapping[str, int], kept: Mapping[str, int]) -> frozenset[str]:
        """What a kernel keeps to compute the `wanted` values of its registers again, beside what is
        `kept`."""
        free = self.all.fixed | kept.keys()
        made_from = {
            name: [
                home
                for home in dict.fromkeys(map(self.all.homes.__getitem__, self.ops[self.made[name]].inputs))
                if home not in free
            ]
            for name in self.registers
        }
        values = {*made_from, *(source for sources in made_from.values() for source in sources)}
        return cheapest_cut(self._sizes(values), made_from, wanted)

    def everything(self) -> Saved:
        """What is kept when nothing is computed again."""
        return Saved(self._sizes(self.needed_by), self.internal_bytes, *self._peak())

    def by_mode(self, again: Again) -> dict[str, Saved]:
        """What a block keeps under each mode. Before its backward all the rest is computed again at once."""
        none = self.everything()
        entering = self._sizes(self._entering())
        found: dict[str, Saved] = {"none": none}
        for mode in MODES[1:]:
            kept = [index for index, twice in enumerate(again[mode]) if not twice]
            internal_bytes = sum(
                self.needs[index].internal_bytes
                for index in kept
                if mode == "attention" or self.kinds[index] != "matmul"  # else made from what is kept
            )
            storages = none.storages
            if mode == "full":
                storages, internal_bytes = entering, 0
            elif mode != "attention":
                results = (self.all.homes[name] for index in kept for name in self.ops[index].outputs)
                storages = entering | self._sizes(name for name in results if name in self.made)
            beside = sum(size for name, size in storages.items() if name not in none.storages)
            found[mode] = Saved(storages, internal_bytes, none.peak_bytes + beside)
        return found

    def again(self, mode: RecomputeMode) -> tuple[bool, ...]:
        """For each op whether it runs again under a mode."""
        if mode == "full" and self.all.software.recompute_stops_early:
            return self._wanted()
        num_products = 0
        found = []
        for op, kind in zip(self.ops, self.kinds, strict=True):
            found.append(self.all.runs_again(op, kind, num_products, mode))
            num_products += kind == "matmul"
        return tuple(found)

    def _wanted(self) -> tuple[bool, ...]:
        """For each op whether a backward reads what it makes, or what is made from it."""
        wanted = {*self.needed_by, *(name for need in self.needs for name in need.storages)}
        flags = [False] * len(self.ops)
        for index in reversed(range(len(self.ops))):
            op = self.ops[index]
            if self.needs[index].internal_bytes or any(self.all.homes[name] in wanted for name in op.outputs):
                flags[index] = True
                wanted.update(self.all.homes[name] for name in op.inputs)
        return tuple(flags)

    def _sizes(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self.all.tensors[name].num_bytes for name in names}

    def _entering(self) -> dict[str, int]:
        """Storages of activations that are made before the run, each with the last op of it that reads it."""
        found: dict[str, int] = {}
        for index, op in enumerate(self.ops):
            if self.kinds[index] != "view":
                for name in op.inputs:
                    home = self.all.homes[name]
                    is_float = self.all.tensors[home].dtype.is_floating_point
                    if is_float and home not in self.made and home not in self.all.fixed:
                        found[home] = index
        return found

    # --- the time line --------------------------------------------------------------------------------------

    def _peak(self) -> tuple[int, Phase]:
        """The most bytes held at a time, and in which phase. Op i runs forward at time i of 2n, and backward
        at 2n - 1 - i."""
        num_ops = len(self.ops)
        change = [0] * (2 * num_ops + 1)
        for num_bytes, first, last in self._lives():
            change[min(first, last)] += num_bytes
            change[last + 1] -= num_bytes
        held = peak = 0
        phase: Phase = "forward"
        for time, size in enumerate(change[:-1]):
            held += size
            if held > peak:
                peak, phase = held, "forward" if time < num_ops else "backward"
        return peak, phase

    def _lives(self) -> Iterator[tuple[int, int, int]]:
        """Everything that is held: its bytes, and the first and the last time."""
        end = 2 * len(self.ops) - 1
        values = {**self._entering(), **self.made}
        for name in self.needed_by.keys() - values.keys():
            values[name] = self.needed_by[name]  # a shard, read here in its gathered form
        for name in values:
            tensor = self.all.tensors[name]
            first = self.place[self.made[name]] if name in self.made else 0
            last = self._last_read(name)
            if name in self.needed_by:
                yield tensor.num_bytes, first, end - self.place[self.needed_by[name]]
            elif name not in self.registers:
                yield tensor.num_bytes, first, len(self.ops) - 1 if name in self.all.outputs else last
            if name in self.registers:
                continue
            if tensor.requires_grad:
                yield tensor.num_bytes, end - last, end - first
            if name in self.all.shards:  # gathered once more
                yield tensor.num_bytes, end - last, end - self._first_read(name)
        for index, (op, need) in enumerate(zip(self.ops, self.needs, strict=True)):
            at = self.place[index]
            yield need.internal_bytes, at, end - at
            if is_loss(op) and not self.all.software.fused_loss:
                yield need.internal_bytes, end - at, end - at  # the gradient of the log-softmax
            if not self.all.software.fused_gradient_accumulation:
                weights = (
                    self.all.tensors[name] for name in op.inputs if name in self.all.graph.parameter_tensors
                )
                yield sum(each.num_bytes for each in weights), end - at, end - at

    def _last_read(self, name: str) -> int:
        """When a value is read last in the forward: the end of the run if others read it later."""
        reader = max(0, self.all.last_reader.get(name, 0) - self.start)  # 0 where it was read before the run
        if reader >= len(self.ops):
            return len(self.ops) - 1
        return max(self.place[reader], self.made.get(name, 0))

    def _first_read(self, name: str) -> int:
        readers = (index - self.start for index in self.all.readers.get(name, ()))
        return min((self.place[index] for index in readers if 0 <= index < len(self.ops)), default=0)
