"""How a model initialises its parameters: asked of its modules, while nothing is written.

Modules of torch say it in `reset_parameters`, models of Hugging Face and many others in
`_init_weights(module)`, which has the last word. Both are run under a mode that notes what they would do to
parameters and leaves it at that. What they copy (the decay rates of a Mamba layer) goes with the program, and
so do parameters that have a value and of which no module tells more (the temperature of CLIP). A parameter
that is not finite has no value: nothing was put into its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autopar.runtime.initial import Recipe

FRESH = {"normal_", "trunc_normal_", "uniform_", "fill_", "zero_"}
"""Ops after which nothing is left of what was there."""

CHANGES = {"mul_", "div_", "add_", "clamp_"}
"""Ops with numbers that may follow."""

SAVED: Recipe = (("saved",),)
"""Of parameters whose value goes with the program."""

DEFAULTS: Mapping[str, tuple[float, ...]] = {"normal_": (0.0, 1.0), "uniform_": (0.0, 1.0)}


@dataclass(frozen=True)
class Initial:
    """How the parameters of a model begin, as far as it tells: recipes by all their names, and the values
    that they copy."""

    recipes: Mapping[str, Recipe] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)


NOTHING_KNOWN = Initial()


def initial_values(model: nn.Module) -> Initial:
    """How every parameter begins; the model stays as it is. Parameters without a value, as all are on the
    meta device, are left out where no module tells."""
    named = dict(model.named_parameters(remove_duplicate=False))
    recipes: dict[int, Recipe | None] = {}
    copied: dict[int, Tensor] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _as_if_new(named.values()):
        torch.default_generator.manual_seed(0)
        for further, function, arguments in _questions(model):
            notes = _asked(named.values(), function, *arguments)
            recipes |= {each: recipe for each, recipe in notes.recipes.items() if each not in further}
            copied |= {each: value for each, value in notes.copied.items() if each not in further}
    for parameter in named.values():
        if recipes.get(id(parameter)) is None and _has_value(parameter):
            recipes[id(parameter)], copied[id(parameter)] = SAVED, parameter.detach().cpu().clone()
    found = {name: recipe for name, each in named.items() if (recipe := recipes.get(id(each)))}
    return Initial(found, {name: copied[id(named[name])] for name in found if found[name][:1] == SAVED})


def _has_value(parameter: Tensor) -> bool:
    """Whether it was given values: memory as it was found holds no number somewhere, a mask infinities."""
    if parameter.is_meta:
        return False
    values = parameter.float() if parameter.dtype.itemsize == 1 else parameter  # torch knows no more of these
    return bool(values.isfinite().any() and not values.isnan().any())


def _questions(model: nn.Module) -> Iterator[tuple[set[int], Any, tuple[object, ...]]]:
    """What to run, with the ids of parameters of which it has no say: those that a module holds further on
    and that are tied to an earlier one's."""
    first: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            first.setdefault(id(parameter), module)

    def further(module: nn.Module) -> set[int]:
        held = map(id, module.parameters(recurse=False))
        return {each for each in held if first[each] is not module}

    for module in model.modules():
        if isinstance(reset := getattr(module, "reset_parameters", None), _METHOD):
            yield further(module), reset, ()
    for module, owner in _owners(model, None):
        yield further(module), owner._init_weights, (module,)


def _asked(parameters: Iterable[Tensor], function: Any, *arguments: object) -> _Notes:
    """What a function does to parameters; nothing where it cannot be run so."""
    notes = _Notes(parameters)
    with notes, patch.object(nn.init, "_no_grad_trunc_normal_", notes.note_truncated), suppress(Exception):
        function(*arguments)  # a stranger's code, on tensors that do not change under it
    return notes


_METHOD = type(nn.Module().modules)


def _owners(module: nn.Module, owner: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Every module after those inside it, with the innermost one around it that has `_init_weights`."""
    if isinstance(getattr(module, "_init_weights", None), _METHOD):
        owner = module
    for child in module.children():
        yield from _owners(child, owner)
    if owner is not None:
        yield module, owner


@contextmanager
def _as_if_new(parameters: Iterable[Any]) -> Iterator[None]:
    """Without the marks by which `transformers` knows what it has initialised already."""
    marked = [each for each in parameters if getattr(each, "_is_hf_initialized", False)]
    for parameter in marked:
        parameter._is_hf_initialized = False
    try:
        yield
    finally:
        for parameter in marked:
            parameter._is_hf_initialized = True


_META = torch.device("meta")


class _Notes(TorchDispatchMode):
    """Notes what is done to some tensors in place, and does not do it: recipes, and what was copied, by the
    ids of the tensors.

    What is computed from one of them is not what it would have been. It is followed by its storage
    (`derived`), and where it is copied the recipes of both cannot be told.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.whole: dict[int, list[Tensor]] = {}
        for each in tensors:
            self.whole.setdefault(each.untyped_storage()._cdata, []).append(each)
        self.recipes: dict[int, Recipe | None] = {}
        self.copied: dict[int, Tensor] = {}
        self.derived: dict[int, tuple[torch.UntypedStorage, set[int]]] = {}

    def note_truncated(
        self, target: Tensor, mean: float, std: float, a: float, b: float, generator: object = None
    ) -> Tensor:
        """In place of torch's function, which draws until all numbers are between `a` and `b`."""
        return self._note("trunc_normal_", target, (mean, std, a, b))

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if target is None or not name.endswith("_") or target.untyped_storage()._cdata not in self.whole:
            kwargs = kwargs or {}
            if kwargs.get("device") == _META:  # as the parameter that it is for
                kwargs = {**kwargs, "device": "cpu"}
            made = op(*args, **kwargs)
            if not (name.endswith("_like") or name.startswith("new_")):
                self._follow(made, args)
            return made
        return self._note(name, target, args[1:])

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
