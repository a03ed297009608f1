"""What an initialiser does to tensors, noted while none of it is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from autopar.runtime.initial import Recipe

FRESH = {"normal_", "trunc_normal_", "uniform_", "fill_", "zero_"}
"""Ops after which nothing is left of what was there."""

CHANGES = {"mul_", "div_", "add_", "clamp_"}
"""Ops with numbers that may follow."""

SAVED: Recipe = (("saved",),)
"""Of parameters whose value goes with the program."""

DEFAULTS: Mapping[str, tuple[float, ...]] = {"normal_": (0.0, 1.0), "uniform_": (0.0, 1.0)}


Memory = Mapping[int, Sequence[Tensor]]
"""Tensors by the storage that they lie in."""


def by_memory(tensors: Iterable[Tensor]) -> Memory:
    """Tensors by the storage that they lie in."""
    found: dict[int, list[Tensor]] = {}
    for each in tensors:
        found.setdefault(each.untyped_storage()._cdata, []).append(each)
    return found


_META = torch.device("meta")


class Notes(TorchDispatchMode):
    """Notes what is done to some tensors in place, and does not do it: recipes, and what was copied, by the
    ids of the tensors.

    What is computed from one of them is not what it would have been. It is followed by its storage
    (`derived`), and where it is copied the recipes of both cannot be told.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.whole = memory
        self.recipes: dict[int, Recipe | None] = {}
        self.copied: dict[int, Tensor] = {}
        self.derived: dict[int, tuple[torch.UntypedStorage, set[int]]] = {}

    def note_truncated(
        self, target: Tensor, mean: float, std: float, a: float, b: float, generator: object = None
    ) -> Tensor:
        """In place of torch's function, which draws until all numbers are between `a` and `b`."""
        return self._note("trunc_normal_", target, (mean, std, a, b))

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = op.overloadpacket.__name__, kwargs or {}
        written = [each for each in _written(op, args, kwargs) if self._is_noted(each)]
        if args and written and written[0] is args[0] and name.endswith("_"):
            return self._note(name, args[0], args[1:])
        if written:
            return self._note_opaque(op, written, args, kwargs)
        if kwargs.get("device") == _META:  # as the parameter that it is for
            kwargs = {**kwargs, "device": "cpu"}
        made = op(*args, **kwargs)
        if not (name.endswith("_like") or name.startswith("new_")):
            self._follow((made, _written(op, args, kwargs)), (args, kwargs))
        return made

    def _is_noted(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.whole

    def _note_opaque(self, op: Any, written: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Of an op with results elsewhere than in its first operand, as with `out=` or of lists: no recipe
        can be told of what it has to do with. It writes into copies."""
        copies = {id(each): each.clone() for each in written}
        given = tree_map_only(Tensor, lambda each: copies.get(id(each), each), (args, kwargs))
        made = op(*given[0], **given[1])
        reads = {each for read in _tensors((args, kwargs)) for each in self._origins(read)}
        self._follow(_written(op, args, kwargs), (args, kwargs))
        self.recipes |= dict.fromkeys(reads)
        originals = {id(copies[id(each)]): each for each in written}
        return tree_map_only(Tensor, lambda each: originals.get(id(each), each), made)

    def _follow(self, made: Any, args: Any) -> None:
        origins = {each for read in _tensors(args) for each in self._origins(read)}
        for storage in (each.untyped_storage() for each in _tensors(made)) if origins else ():
            if storage._cdata not in self.whole:
                self.derived.setdefault(storage._cdata, (storage, set()))[1].update(origins)

    def _origins(self, tensor: Tensor) -> set[int]:
        """The ids of the noted tensors from whose values this one follows."""
        key = tensor.untyped_storage()._cdata
        return {id(each) for each in self.whole.get(key, ())} or self.derived.get(key, (None, set()))[1]

    def _note(self, op: str, target: Tensor, numbers: Any) -> Tensor:
        origins = {each for read in _tensors(numbers) for each in self._origins(read)}
        for each in self.whole[target.untyped_storage()._cdata]:
            if _overlap(each, target):
                recipe = (
                    None if origins else self._after(self.recipes.get(id(each)), each, target, op, numbers)
                )
                self.recipes[id(each)] = recipe
        self.recipes |= dict.fromkeys(origins)
        return target

    def _after(
        self, recipe: Recipe | None, whole: Tensor, target: Tensor, op: str, numbers: Any
    ) -> Recipe | None:
        """The recipe with one more op; None where it cannot be told."""
        if op == "copy_" and _layout(target) == _layout(whole) and not numbers[0].is_meta:
            self.copied[id(whole)] = numbers[0].detach().cpu().expand(whole.shape).to(whole.dtype, copy=True)
            return SAVED
        if not all(isinstance(number, int | float) for number in numbers):
            return None
        step = ("fill_", 0.0) if op == "zero_" else (op, *map(_rounded, numbers or DEFAULTS.get(op, ())))
        if _extent(target) == _extent(whole) and target.numel() == whole.numel():
            if op in FRESH:
                return (step,)
            return (*recipe, step) if recipe is not None and op in CHANGES else None
        is_row = (target.shape, target.stride()) == (whole.shape[1:], whole.stride()[1:])
        if recipe is not None and step == ("fill_", 0.0) and is_row:
            row = (target.storage_offset() - whole.storage_offset()) // max(1, whole.stride(0))
            return (*recipe, ("zero_row", row))  # of padding
        return None


def _written(op: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The operands that an op changes, by its schema."""
    schema = op._schema.arguments
    given = (args[place] if place < len(args) else kwargs.get(each.name) for place, each in enumerate(schema))
    changed = (
        value
        for each, value in zip(schema, given, strict=True)
        if each.alias_info and each.alias_info.is_write
    )
    return [*_tensors(list(changed))]


def _tensors(values: Any) -> Iterator[Tensor]:
    return (each for each in tree_leaves(values) if isinstance(each, Tensor))


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Where its elements begin in the storage, and where the last one lies."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()), int(tensor.storage_offset() + sum(steps))


def _overlap(one: Tensor, other: Tensor) -> bool:
    (first, last), (begin, end) = _extent(one), _extent(other)
    return max(first, begin) <= min(last, end)


def _rounded(number: float) -> float:
    """To six digits: square roots of widths differ in the last ones."""
    return float(f"{number:.6g}")
