"""Building rules: name every dimension, and let sizes and broadcasting follow from the shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import gcd, prod

from graphs.ir import Tensor
from graphs.rules.rule import Dim, Rule

WHOLE: Dim = ()
"""A dimension that no factor splits."""

SectionKey = tuple[str, int, int]
"""`("operand" | "result", index, dim)`."""


def numbered(rank: int, start: int = 0) -> list[Dim]:
    """`rank` dimensions of one factor each: `d0`, `d1`, ... from number `start`."""
    return [(f"d{start + index}",) for index in range(rank)]


def aligned(dims: Sequence[Dim], rank: int) -> list[Dim]:
    """The last `rank` of the dimensions: what a tensor that broadcasts from the right has of them."""
    return list(dims[len(dims) - rank :])


def without(dims: Sequence[Dim], chosen: Collection[int], *, keep: bool = False) -> list[Dim]:
    """The dimensions but the chosen ones, which are dropped, or stand as `WHOLE` with `keep`."""
    kept = (WHOLE if index in chosen else dim for index, dim in enumerate(dims))
    return [dim for index, dim in enumerate(kept) if keep or index not in chosen]


def factors(dims: Iterable[Dim]) -> frozenset[str]:
    """All factors of some dimensions."""
    return frozenset(name for dim in dims for name in dim)


def chosen_dims(dim: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Dimensions counted from the front; None and an empty list mean all, as in torch's reductions."""
    if dim is None or (not isinstance(dim, int) and not dim):
        return tuple(range(rank))
    given = (dim,) if isinstance(dim, int) else dim
    return tuple(sorted(index % max(rank, 1) for index in given)) if rank else ()


def make_rule(
    operands: Sequence[Tensor],
    results: Sequence[Tensor],
    operand_dims: Sequence[Sequence[Dim]],
    result_dims: Sequence[Sequence[Dim]],
    *,
    sizes: Mapping[str, int] | None = None,
    reductions: Iterable[str] = (),
    unsplittable: Iterable[str] = (),
    contiguous: Iterable[str] = (),
    linear: Iterable[Iterable[int]] = (),
    sections: Mapping[SectionKey, Sequence[int]] | None = None,
    implemented: Mapping[str, str] | None = None,
    whole: Iterable[str] = (),
) -> Rule:
    """A rule with the sizes of its factors read off the shapes.

    `sizes` gives those of factors that never stand alone in a dimension. A dimension of size 1 holds no
    factor, which is how broadcasting is expressed, and factors of size 1 are left out. Of `reductions` and
    the like only factors that are still there count.
    """
    nonempty = {key: tuple(part for part in parts if part) for key, parts in (sections or {}).items()}
    cuts = {key: parts for key, parts in nonempty.items() if len(parts) > 1}
    shapes = {"operand": [t.shape for t in operands], "result": [t.shape for t in results]}
    dims = {"operand": [list(d) for d in operand_dims], "result": [list(d) for d in result_dims]}
    extents = _extents(shapes, dims, cuts, sizes or {})
    kept = {name: size for name, size in extents.items() if size > 1}

    def filtered(side: str) -> tuple[tuple[Dim, ...], ...]:
        return tuple(
            tuple(
                tuple(name for name in dim if name in kept) if extent != 1 else WHOLE
                for dim, extent in zip(tensor, shape, strict=True)
            )
            for tensor, shape in zip(dims[side], shapes[side], strict=True)
        )

    return Rule(
        sizes=kept,
        operands=filtered("operand"),
        results=filtered("result"),
        reductions=frozenset(reductions) & kept.keys(),
        unsplittable=frozenset(unsplittable) & kept.keys(),
        contiguous=frozenset(contiguous) & kept.keys(),
        linear=tuple(frozenset(members) for members in linear),
        sections={
            key: parts for key, parts in cuts.items() if set(dims[key[0]][key[1]][key[2]]) & kept.keys()
        },
        implemented={name: form for name, form in (implemented or {}).items() if name in kept},
        whole=frozenset(whole) & kept.keys(),
    )


def _extents(
    shapes: Mapping[str, Sequence[Sequence[int]]],
    dims: Mapping[str, Sequence[Sequence[Dim]]],
    sections: Mapping[SectionKey, Sequence[int]],
    given: Mapping[str, int],
) -> dict[str, int]:
    seen: dict[str, dict[int, None]] = defaultdict(dict)
    cut: set[str] = set()
    for side in ("operand", "result"):
        for index, (tensor, shape) in enumerate(zip(dims[side], shapes[side], strict=True)):
            assert len(tensor) == len(shape), (
                f"{side} {index} has {len(shape)} dimensions, the rule {len(tensor)}"
            )
            for position, (dim, extent) in enumerate(zip(tensor, shape, strict=True)):
                parts = sections.get((side, index, position))
                for name in dim:
                    seen[name]
                if parts is not None:
                    cut.update(dim)
                    seen[dim[0]].update(dict.fromkeys(parts))
                elif len(dim) == 1 and extent != 1 and dim[0] not in given:
                    seen[dim[0]][extent] = None
    for name, extents in seen.items():
        assert name in given or name in cut or len(extents) <= 1, (
            f"factor {name} has the extents {list(extents)}"
        )
    return {name: given.get(name, gcd(*extents) if extents else 1) for name, extents in seen.items()}


def check(rule: Rule, operands: Sequence[Tensor], results: Sequence[Tensor]) -> str | None:
    """What is inconsistent between a rule and the tensors it speaks of, None where nothing is."""
    for side, tensors, all_dims in (("operand", operands, rule.operands), ("result", results, rule.results)):
        if len(tensors) != len(all_dims):
            return f"it has {len(tensors)} {side}s, the rule {len(all_dims)}"
        for index, (tensor, dims) in enumerate(zip(tensors, all_dims, strict=True)):
            problem = _check_tensor(rule, (side, index), tensor, dims)
            if problem is not None:
                return f"{side} {index} is {tensor.name}{list(tensor.shape)}: {problem}"
    named = factors(dim for tensor in (*rule.operands, *rule.results) for dim in tensor)
    told = rule.reductions | rule.unsplittable | rule.contiguous | rule.whole | rule.implemented.keys()
    unknown = told - named
    return f"no dimension holds the factors {sorted(unknown)}" if unknown else None


def _check_tensor(rule: Rule, place: tuple[str, int], tensor: Tensor, dims: Sequence[Dim]) -> str | None:
    if len(dims) != len(tensor.shape):
        return f"the rule gives it {len(dims)} dimensions"
    cut = {
        name
        for (side, index, dim) in rule.sections
        for name in (rule.operands if side == "operand" else rule.results)[index][dim]
    }
    for position, (dim, extent) in enumerate(zip(dims, tensor.shape, strict=True)):
        missing = [name for name in dim if name not in rule.sizes]
        if missing:
            return f"the rule gives no size to factor {missing[0]}"
        parts = rule.sections.get((*place, position))
        if parts is not None:
            if sum(parts) != extent or len(dim) != 1:
                return f"dimension {position} cannot be the sections {parts} of one factor"
        elif dim and not cut & set(dim) and prod(rule.sizes[name] for name in dim) != extent:
            return f"dimension {position} is not {' x '.join(f'{name}={rule.sizes[name]}' for name in dim)}"
    return None
