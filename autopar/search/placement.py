"""Which mesh axis lies on which links.

Ranks fill the cluster's levels from the inside out and the mesh is row-major, so the order of the axes
decides what each group of ranks communicates over: the innermost axis gets the fastest links, the outermost
the slowest. Tensor parallelism is innermost by default (`plan.MESH_AXES`), where it nearly always belongs;
which of the others comes next, or whether a data axis should have the fast links instead, depends on sizes
and links. Orders in which every communicating group gets the same links cost the same, and one of them is
enough: 120 permutations come down to a handful.

The search takes the usual order; what it finds is placed afterwards, with all else as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import compress, permutations

from autopar.plan import MESH_AXES, Parallelism
from autopar.pricing import Pricer, total
from autopar.ranks import Link, RankGroups, Steps
from autopar.search.data_axes import data_groups, expert_shares, mesh_groups, strides
from autopar.search.evaluate import Evaluator
from autopar.search.local_programs import Program
from autopar.search.outcome import Solved
from autopar.search.units import Chain, Unit
from costmodel import Group, spans
from hardware_db import Cluster

AxisOrder = tuple[str, ...]


def orders(p: Parallelism, cluster: Cluster) -> tuple[AxisOrder, ...]:
    """The orders of the mesh axes that differ in the links of some communicating group, `p`'s own first.

    Raises CostModelError when the cluster has fewer devices than the mesh.
    """
    known: dict[Group, object] = {}
    found: dict[tuple[object, ...], AxisOrder] = {}
    for order in _permutations(p):
        groups = communicating_groups(p.model_copy(update={"axis_order": order}))
        for group in groups:
            if group not in known:
                known[group] = _links(group, cluster)
        found.setdefault(tuple(known[group] for group in groups), order)
    return tuple(found.values())


def best_order(
    evaluate: Callable[[Parallelism], float], p: Parallelism, cluster: Cluster
) -> tuple[Parallelism, float]:
    """The parallelism in the order of axes for which `evaluate` is least, and that value; ties go to `p`'s
    own order."""
    reordered = (p.model_copy(update={"axis_order": order}) for order in orders(p, cluster))
    return min(((each, evaluate(each)) for each in reordered), key=lambda found: found[1])


def placed(solved: Solved, evaluator: Evaluator) -> Solved:
    """The candidate in the order of axes that is best on the evaluator's cluster, its program, cuts and
    choices as they are; itself where no other order is better than its own."""
    candidate = solved.evaluated
    found = {candidate.parallelism: candidate}

    def step_s(p: Parallelism) -> float:
        if p not in found:
            chain = placed_chain(solved.program, p, evaluator)
            found[p] = evaluator.evaluate(chain, p, candidate.cuts, candidate.choices)
        return found[p].step_s

    best, _ = best_order(step_s, candidate.parallelism, evaluator.cluster)
    return solved if found[best] is candidate else replace(solved, evaluated=found[best])


def placed_chain(program: Program, p: Parallelism, evaluator: Evaluator) -> Chain:
    """The chain of a program at its prices where `p` has its axes; choices keep their names and meaning."""
    if p.axis_order == MESH_AXES:
        return program.chain
    pricer = Pricer(evaluator.cluster, _program_groups(program, p), like=evaluator.pricer)
    moved: dict[tuple[int, int], Unit] = {}
    units = []
    for unit in program.chain.units:
        key = id(unit.kernels), id(unit.again)
        if key not in moved:
            moved[key] = _moved(unit, pricer)
        like = moved[key]
        units.append(unit._replace(cost=like.cost, unpaced=like.unpaced, recompute_s=like.recompute_s))
    return replace(program.chain, units=tuple(units))


def _moved(unit: Unit, pricer: Pricer) -> Unit:
    costs = [pricer.priced(kernels) for kernels in unit.kernels]
    again_s = {
        name: pricer.unit(list(compress(costs, flags))).forward_total_s for name, flags in unit.again.items()
    }
    unpaced = total(costs)
    return unit._replace(cost=unpaced.paced, unpaced=unpaced, recompute_s=again_s)


def _program_groups(program: Program, p: Parallelism) -> Mapping[str, Group]:
    """The groups that the ops of a program communicate over; where two replicas stand for any number of
    them, the data axis is as wide as it can be, pipeline and all (`Programs`)."""
    groups, steps = mesh_groups(p), strides(p)
    if program.key.data_size != 2:
        return groups
    outer = (axis for axis in reversed(p.axis_order) if axis not in ("tp", "cp"))
    return groups | {"dp": Group.of(*((getattr(p, axis), steps[axis]) for axis in outer))}


def groups(p: Parallelism) -> Mapping[str, tuple[tuple[int, ...], ...]]:
    """The world ranks of every group, by axis; axes of one rank are left out. Experts are under `ep`."""
    return {each.axis: tuple(each.groups()) for each in rank_groups(p)}


def rank_groups(p: Parallelism, cluster: Cluster | None = None) -> tuple[RankGroups, ...]:
    """The groups of every axis with more than one rank, outermost axis first, in a form that stays small;
    with the links that they meet on, if told the cluster."""
    return tuple(_rank_groups(p, axis, cluster) for axis in (*p.axis_order, "ep") if getattr(p, axis) > 1)


def communicating_groups(p: Parallelism) -> tuple[Group, ...]:
    """Every group over which a training step communicates: those of the axes, and those over which parameters
    are sharded and replicated, experts apart."""
    of_axes = mesh_groups(p)
    experts = data_groups(p, experts=True) if p.ep > 1 else ()
    return (*(of_axes[axis] for axis in ("tp", "cp", "ep", "pp")), *data_groups(p), *experts)


def _permutations(p: Parallelism) -> Iterator[AxisOrder]:
    """Orders of the axes with more than one rank, `p`'s own first; the others stay in their places.

    Replicas of shards stay outside of the shards, as `fully_shard` takes a mesh.
    """
    for order in permutations(p.mesh):
        if order != tuple(p.mesh) and _shards_outside(order):
            continue
        axes = iter(order)
        yield tuple(next(axes) if axis in p.mesh else axis for axis in p.axis_order)


def _shards_outside(order: AxisOrder) -> bool:
    both = {"dp_replicate", "dp_shard"} <= set(order)
    return both and order.index("dp_shard") < order.index("dp_replicate")


def _links(group: Group, cluster: Cluster) -> object:
    """All that the price of a collective depends on."""
    return tuple(
        (
            span.level_names,
            span.num_peers,
            span.num_inside,
            span.bandwidth_bytes_per_s,
            span.pair_bandwidth_bytes_per_s,
            span.num_steps,
        )
        for span in spans(group, cluster)
    )


def _rank_groups(p: Parallelism, axis: str, cluster: Cluster | None) -> RankGroups:
    steps = strides(p)
    shares = expert_shares(p) if axis == "ep" else {axis: getattr(p, axis)}
    group = Group.of(*((share, steps[each]) for each, share in shares.items()))
    rest = Group.of(
        *(
            (getattr(p, each) // shares.get(each, 1), stride * shares.get(each, 1))
            for each, stride in steps.items()
        )
    )
    return RankGroups(
        axis=axis,
        size=group.size,
        members=group.parts,
        starts=_nontrivial(rest.parts),
        links=() if cluster is None else tuple(_shown_links(group, cluster)),
    )


def _nontrivial(parts: Steps) -> Steps:
    return tuple(part for part in parts if part[0] > 1)


def _shown_links(group: Group, cluster: Cluster) -> Iterator[Link]:
    levels = {level.name: level for level in cluster.levels}
    for span in spans(group, cluster):
        rates = (
            levels[name].line_rate_bytes_per_s or levels[name].bandwidth_bytes_per_s
            for name in span.level_names
        )
        yield Link(name="+".join(span.level_names), num_peers=span.num_peers, bytes_per_s=sum(rates))
