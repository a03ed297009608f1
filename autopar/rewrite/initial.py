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

from autopar.rewrite.initial_notes import SAVED, Memory, Notes, by_memory
from autopar.runtime.initial import Recipe


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
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _as_if_new(named.values()), _kept(model) as lost:
        torch.default_generator.manual_seed(0)
        memory = by_memory([*named.values(), *model.buffers()])
        for further, function, arguments in _questions(model):
            notes = _asked(memory, function, *arguments)
            recipes |= {each: recipe for each, recipe in notes.recipes.items() if each not in further}
            copied |= {each: value for each, value in notes.copied.items() if each not in further}
    recipes |= dict.fromkeys(lost)
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
    and that are tied to an earlier one's. Modules come after those inside them, as they are built."""
    first: dict[int, nn.Module] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            first.setdefault(id(parameter), module)

    def further(module: nn.Module) -> set[int]:
        held = map(id, module.parameters(recurse=False))
        return {each for each in held if first[each] is not module}

    for module in reversed([*model.modules()]):
        if isinstance(reset := getattr(module, "reset_parameters", None), _METHOD):
            yield further(module), reset, ()
    for module, owner in _owners(model, None):
        yield further(module), owner._init_weights, (module,)


def _asked(memory: Memory, function: Any, *arguments: object) -> Notes:
    """What a function does to parameters and buffers; nothing where it cannot be run so."""
    notes = Notes(memory)
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


@contextmanager
def _kept(model: nn.Module) -> Iterator[set[int]]:
    """Puts back parameters that get other memory or are replaced, neither of which is an op that could be
    noted, and adds their ids to the set that it gives: nothing is known of them."""
    places = [(module, dict(module._parameters)) for module in model.modules()]
    memory = {parameter: parameter.detach() for parameter in model.parameters()}
    lost: set[int] = set()
    try:
        yield lost
    finally:
        for module, parameters in places:
            found = module._parameters
            lost |= {id(each) for name, each in parameters.items() if found.get(name) is not each}
            found.clear()
            found.update(parameters)
        for parameter, values in memory.items():
            if parameter.untyped_storage()._cdata != values.untyped_storage()._cdata:
                parameter.data = values
                lost.add(id(parameter))
