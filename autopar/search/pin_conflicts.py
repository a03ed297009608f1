"""What pins conflict with: the machine, the batch, the model, and each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING

from autopar.errors import InvalidParallelismError, PinConflictError
from autopar.placements import Shard
from autopar.search.module_patterns import covers, generalized, nearest
from autopar.search.pin_placement import PINNED_AXES, PinnedPlacement
from autopar.search.pin_rules import covered_parameters, placements_of
from autopar.search.pin_stages import named_units, num_stages
from autopar.search.pin_values import BLOCK_MODES, together, written
from autopar.search.space import divisors
from autopar.search.validate import check_dimensions, check_experts
from graphs.ir import OpGraph

if TYPE_CHECKING:
    from autopar.search.pins import Pins

DEGREES = ("tp", "cp", "pp", "dp")
"""The settings whose product is the number of devices."""


def check_pins(pins: Pins, graph: OpGraph, num_devices: int, global_batch: int) -> None:
    """Raises PinConflictError for pins that cannot hold on these devices, with this batch, of this model.

    `graph` is the captured model at full depth.
    """
    check_machine(pins, num_devices, global_batch)
    check_model(pins, graph)
    try:
        check_dimensions(graph, pins.tp or 1)
        if (pins.ep or 1) > 1:
            check_experts(graph, pins.ep or 1, pins.dp or num_devices)
    except InvalidParallelismError as error:
        raise PinConflictError(str(error)) from None


def minimal_conflict(possible: Callable[[Pins], bool], pins: Pins) -> tuple[str, ...]:
    """Pins that exclude each other, in words: without any one of them something is `possible`.

    There may be several such sets; this is the one of the last pins. Empty where nothing is possible even
    without pins.
    """
    kept = 0
    while len(parts := list(pins.parts())) > kept:
        without = parts[kept][1]
        if possible(without):
            kept += 1
        else:
            pins = without
    return tuple(text for text, _ in parts)


def check_machine(pins: Pins, num_devices: int, global_batch: int) -> None:
    """Raises PinConflictError for degrees that do not divide the devices or the batch."""
    for name in (*DEGREES, "ep", "dp_shard"):
        value = getattr(pins, name)
        if value is not None and num_devices % value:
            raise PinConflictError(
                f"{name}={value} does not divide {num_devices} devices; divisors are "
                f"{', '.join(map(str, divisors(num_devices)))}"
            )
    degrees = {name: getattr(pins, name) for name in DEGREES if getattr(pins, name) is not None}
    product = prod(degrees.values())
    if num_devices % product or (len(degrees) == len(DEGREES) and product != num_devices):
        factors = " x ".join(f"{name}={value}" for name, value in degrees.items())
        verb = "does not divide" if num_devices % product else "is not"
        raise PinConflictError(f"{factors} = {product} {verb} {num_devices} devices; free one of them")
    if pins.mesh is not None and prod(pins.mesh) != num_devices:
        raise PinConflictError(
            f"mesh={written(pins.mesh)} has {prod(pins.mesh)} devices, the cluster {num_devices}"
        )
    if "dp" not in degrees and len(degrees) == len(DEGREES) - 1:
        degrees["dp"] = num_devices // product
    dp, size = degrees.get("dp", 1), pins.microbatch_size or 1
    if global_batch % (dp * size):
        factors = " x ".join(
            text for text, value in ((f"dp={dp}", dp), (f"microbatch_size={size}", size)) if value > 1
        )
        raise PinConflictError(f"{factors} does not divide a global batch of {global_batch}")


def check_model(pins: Pins, graph: OpGraph) -> None:
    """Raises PinConflictError for modules that the model lacks, or of which this cannot be asked."""
    for axis in PINNED_AXES:
        for pin in placements_of(pins, axis):
            _check_placement(pin, graph)
        dividing_degrees(pins, graph, axis, ())
    for pattern in pins.recompute_modules:
        _check_blocks(pattern, graph)
    for block in graph.blocks:
        _check_modes(pins, block.path)
    modules = tuple(graph.modules)
    patterns = (*pins.cut_before, *(part for paths in pins.keep_together for part in together(paths)))
    for pattern in patterns:
        if not _any_covered(pattern, modules):
            raise PinConflictError(f"{pattern} matches no module of {graph.name}{nearest(pattern, modules)}")
    if patterns:
        num_stages(pins, named_units(graph))


def dividing_degrees(pins: Pins, graph: OpGraph, axis: str, usual: Iterable[int]) -> tuple[int, ...]:
    """The degrees of an axis, of the `usual` ones and what is pinned, at which all shards that are pinned on
    it are equal. Raises PinConflictError for none."""
    asked: dict[str, PinnedPlacement] = {}
    for pin in placements_of(pins, axis):
        if not pin.is_forbidden:
            asked.update(dict.fromkeys(sorted(covered_parameters(pin, graph)), pin))
    demands = [
        (pin, graph.parameter_tensors[name].name, graph.tensors[name].shape[pin.placement.dim])
        for name, pin in asked.items()
        if isinstance(pin.placement, Shard)
    ]
    tried = pins.values(axis, usual)
    left = tuple(degree for degree in tried if all(extent % degree == 0 for _, _, extent in demands))
    if tried and not left:
        degree = tried[0]
        culprit, parameter, extent = next(each for each in demands if each[2] % degree)
        raise PinConflictError(
            f"{culprit} splits a dimension of {extent} ({parameter}), which {axis}={degree} does not divide"
        )
    return left


def _check_placement(pin: PinnedPlacement, graph: OpGraph) -> None:
    names = tuple(name for p in graph.parameters for name in (p.name, *p.aliases))
    is_known = _any_covered(pin.pattern, names)
    if not is_known and not _any_covered(pin.pattern, graph.modules):
        known = (*graph.modules, *names)
        raise PinConflictError(
            f"{pin}: matches no module or parameter of {graph.name}{nearest(pin.pattern, known)}"
        )
    covered = covered_parameters(pin, graph)
    if pin.placement is not None and not covered:
        what = "none of its parameters has that dimension" if is_known else "it has no parameters"
        raise PinConflictError(f"{pin}: {what}")


def _check_blocks(pattern: str, graph: OpGraph) -> None:
    blocks = tuple(block.path for block in graph.blocks)
    if _any_covered(pattern, blocks):
        return
    for path in (path for path in graph.modules if covers(pattern, path)):
        for block in _holders(path, blocks):
            raise PinConflictError(
                f"recompute {pattern}: lies inside the block {block}, and whole blocks are computed again; "
                f"name {generalized(block)}"
            )
    raise PinConflictError(
        f"recompute {pattern}: matches no repeated block of {graph.name}{nearest(pattern, blocks)}"
    )


def _check_modes(pins: Pins, block: str) -> None:
    if pins.recompute_values(block, BLOCK_MODES):
        return
    culprits = [
        f"recompute {pattern}={mode}"
        for pattern, mode in pins.recompute_modules.items()
        if covers(pattern, block)
    ]
    if pins.recompute is not None:
        culprits.insert(0, f"recompute={pins.recompute}")
    culprits += [f"forbid recompute={mode}" for mode in sorted(pins.forbid.get("recompute", ()), key=str)]
    raise PinConflictError(
        f"{' and '.join(culprits)} leave {block} none of {', '.join(BLOCK_MODES)}; drop one of them"
    )


def _holders(path: str, blocks: Iterable[str]) -> Iterator[str]:
    return (block for block in blocks if path.startswith(f"{block}."))


def _any_covered(pattern: str, paths: Iterable[str]) -> bool:
    return any(covers(pattern, path) for path in paths)
