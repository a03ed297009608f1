"""From a priced route through pools to a `Plan`."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from autopar.module_paths import module_ranges
from autopar.plan import (
    Alternative,
    Certificate,
    ClusterSummary,
    Parallelism,
    Plan,
    PoolPlan,
    Prediction,
    Recomputation,
    StagePlan,
)
from autopar.search.describe import (
    cluster_summary,
    duration,
    model_summary,
    parameter_placements,
    recomputation,
    rule_warnings,
    tokens_per_sample,
)
from autopar.search.outcome import Solved
from autopar.search.placement import rank_groups
from autopar.search.pool_legs import Legs
from autopar.search.pool_prices import PricedLeg, PricedRoute, Prices
from autopar.search.pools import PoolsResult
from costmodel import model_flops_utilization
from hardware_db.pools import collective_library


def build_pool_plan(legs: Legs, result: PoolsResult, solve_s: float | None = None) -> Plan:
    """The plan for the best route, priced again at full depth."""
    assert result.best is not None, "without a plan there is nothing to describe"
    best = Prices(legs).finished(result.best)
    capture = legs.planners[0].capture
    solved = [best.solved(number) for number in range(len(best.legs))]
    pools = tuple(_pool_plan(legs, best, number, solved[number]) for number in range(len(best.legs)))
    return Plan(
        model=model_summary(capture),
        cluster=_whole_cluster(legs, pools),
        parallelism=_parallelism(best.legs[0].parallelism, pp=len(best.cuts)),
        strategies=pools[0].strategies,
        placements=pools[0].placements,
        stages=_stage_plans(best, pools),
        pools=pools,
        recomputation=_recomputation(legs, best, solved),
        prediction=_prediction(legs, best, pools),
        certificate=_certificate(result, best, solve_s),
        alternatives=tuple(_alternative(other, best) for other in result.runners_up),
        warnings=rule_warnings(capture.graph),
    )


def route_label(priced: PricedRoute, legs: Legs) -> str:
    """A short name, such as `dgx-h100*32: dp16 tp4 pp4 ... -> dgx-a100*32: ...`."""
    parts = (f"{legs.pools.pools[leg.pool].id}: {leg.parallelism}" for leg in priced.legs)
    return " -> ".join(parts)


def _pool_plan(legs: Legs, priced: PricedRoute, number: int, solved: Solved) -> PoolPlan:
    leg = priced.legs[number]
    planner, cluster = legs.planners[leg.pool], legs.pools.pools[leg.pool]
    before = [legs.pools.pools[other.pool].num_devices for other in priced.legs[:number]]
    return PoolPlan(
        cluster=cluster_summary(cluster, planner.capture),
        collective_library=collective_library(cluster.device),
        parallelism=_parallelism(leg.parallelism),
        first_rank=sum(before),
        first_stage=priced.route.first_stage(number),
        rank_groups=rank_groups(leg.parallelism, cluster),
        strategies=solved.program.strategies,
        placements=parameter_placements(planner.capture.graph, solved),
    )


def _parallelism(p: Parallelism, **changed: object) -> Parallelism:
    return Parallelism.model_validate({**p.model_dump(), **changed})


def _whole_cluster(legs: Legs, pools: Sequence[PoolPlan]) -> ClusterSummary:
    """The pools that are used as one machine: the least memory, and the mean of peaks and prices."""
    parts = [pool.cluster for pool in pools]
    num_devices = sum(part.num_devices for part in parts)
    prices = [part.price_usd_per_device_hour for part in parts]
    known = [price for price in prices if price is not None]
    weights = [part.num_devices / num_devices for part in parts]
    return ClusterSummary(
        id=legs.pools.id if len(parts) > 1 else parts[0].id,
        name=legs.pools.name if len(parts) > 1 else parts[0].name,
        device=" + ".join(part.device for part in parts),
        num_devices=num_devices,
        devices_per_node=max(part.devices_per_node for part in parts),
        memory_bytes=min(part.memory_bytes for part in parts),
        peak_flops_per_s=fsum(w * part.peak_flops_per_s for w, part in zip(weights, parts, strict=True)),
        price_usd_per_device_hour=(
            fsum(w * price for w, price in zip(weights, known, strict=True))
            if len(known) == len(parts)
            else None
        ),
    )


def _stage_plans(priced: PricedRoute, pools: Sequence[PoolPlan]) -> tuple[StagePlan, ...]:
    stages = []
    for leg, pool in zip(priced.legs, pools, strict=True):
        units = leg.program.chain.units
        ends = (*priced.cuts, len(units))
        for index, (work, ledger) in enumerate(zip(leg.stages, leg.ledgers, strict=True), pool.first_stage):
            mine = units[ends[index] : ends[index + 1]]
            stages.append(
                StagePlan(
                    index=index,
                    first_op=mine[0].first_op,
                    modules=module_ranges(module for unit in mine for module in unit.modules),
                    forward_s=work.forward_s + work.forward_communication_s,
                    backward_s=work.recompute_s + work.backward_s + work.backward_communication_s,
                    memory_bytes=dict(ledger.entries),
                    pool=pool.cluster.id,
                )
            )
    return tuple(stages)


def _recomputation(legs: Legs, priced: PricedRoute, solved: Sequence[Solved]) -> tuple[Recomputation, ...]:
    graph = legs.planners[0].capture.graph
    return tuple(part for each in solved for part in recomputation(graph, each.evaluated))


def _prediction(legs: Legs, priced: PricedRoute, pools: Sequence[PoolPlan]) -> Prediction:
    capture = legs.planners[0].capture
    batch = priced.legs[0].parallelism.global_batch
    flops = 3 * capture.graph.flops / 2 * batch  # a backward is two forwards
    cluster = _whole_cluster(legs, pools)
    terms_s = dict(priced.step.terms)
    terms_s["send_recv"] += priced.step_s - priced.step.total_s
    return Prediction(
        software=legs.evaluators[0].era.name,
        step_s=priced.step_s,
        terms_s=terms_s,
        tokens_per_s=tokens_per_sample(capture) * batch / priced.step_s,
        model_flops_per_s_per_device=flops / priced.step_s / cluster.num_devices,
        mfu=model_flops_utilization(flops, priced.step_s, cluster.num_devices, cluster.peak_flops_per_s),
        peak_memory_bytes=max(_peak_bytes(leg) for leg in priced.legs),
    )


def _peak_bytes(leg: PricedLeg) -> float:
    return max(ledger.total_bytes for ledger in leg.ledgers)


def _certificate(result: PoolsResult, best: PricedRoute, solve_s: float | None) -> Certificate:
    bound_s = min(best.step_s, result.bound_s)
    return Certificate(
        status="optimal" if bound_s >= best.step_s * (1 - 1e-6) else "feasible",
        objective_s=best.step_s,
        bound_s=bound_s,
        num_candidates=result.num_candidates,
        num_solved=result.num_solved,
        pruned=result.pruned,
        solve_s=solve_s,
    )


def _alternative(other: PricedRoute, best: PricedRoute) -> Alternative:
    ratio = other.step_s / best.step_s
    leg = other.legs[0]
    return Alternative(
        label=" -> ".join(str(each.parallelism) for each in other.legs),
        parallelism=_parallelism(leg.parallelism, pp=len(other.cuts)),
        step_s=other.step_s,
        peak_memory_bytes=max(map(_peak_bytes, other.legs)),
        reason=f"{ratio:.2f}x slower: +{duration(other.step_s - best.step_s)}",
    )
