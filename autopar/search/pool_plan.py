"""The plan for pools: what their search found, by names and with predictions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import fsum

from autopar.errors import InfeasibleError
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
    alternative,
    build_plan,
    certificate,
    cluster_summary,
    duration,
    model_summary,
    parameter_placements,
    recomputation,
    rule_warnings,
    tokens_per_sample,
)
from autopar.search.infeasible import infeasible
from autopar.search.placement import rank_groups
from autopar.search.planner import Planner
from autopar.search.pool_legs import Legs
from autopar.search.pool_prices import PricedLeg, PricedRoute, Prices
from autopar.search.pools import PoolSearch, PoolsResult, Report
from costmodel import model_flops_utilization
from hardware_db import Pools
from hardware_db.pools import collective_library

RELATIVE_ERROR = 1e-3
"""By how much the shallow model of the search may differ from the full one."""


def plan_pools(
    planners: Sequence[Planner],
    pools: Pools,
    *,
    time_limit_s: float | None = None,
    report: Report | None = None,
) -> Plan | None:
    """The best plan for pools, each with its planner, whose batch and pins are the same; None where the
    shallow model of the search did not tell the truth about the full one.

    Raises as `autopar.plan`.
    """
    started = time.monotonic()
    legs = Legs(planners, pools)
    search = PoolSearch(legs, planners[0].global_batch, planners[0].pins, time_limit_s, report)
    result = search.run()
    if result.best is not None:
        best = Prices(legs).finished(result.best)
        proof = certificate(result, best.step_s, legs.effort, time.monotonic() - started)
        return _pipeline(legs, best, proof, result) if _agree(best, result.best) else None
    if result.alone is None:
        raise _infeasible(legs, result)
    pool, found = result.alone
    assert found.best is not None, "a pool by itself counts only with a plan"
    solved = planners[pool].finish(found.best)
    step_s = solved.evaluated.step_s
    if abs(step_s - found.best.evaluated.step_s) > RELATIVE_ERROR * step_s or not solved.evaluated.fits:
        return None
    others = [(str(each.parallelism), each) for each in found.runners_up]
    others += [(name, each) for name, each in found.baselines.items() if each is not None]
    idle = " and ".join(each.id for number, each in enumerate(pools.pools) if number != pool)
    return build_plan(
        planners[pool],
        solved,
        certificate(result, step_s, legs.effort, time.monotonic() - started),
        [alternative(label, each, solved.evaluated) for label, each in others],
        [f"{idle} stays idle: every pipeline through it takes longer"],
    )


def _agree(full: PricedRoute, short: PricedRoute) -> bool:
    """Whether the shallow model told the truth about the full one."""
    return full.fits and abs(full.step_s - short.step_s) <= RELATIVE_ERROR * full.step_s


def _pipeline(legs: Legs, best: PricedRoute, certificate: Certificate, result: PoolsResult) -> Plan:
    """The plan of a pipeline through pools, priced at full depth."""
    capture = legs.planners[0].capture
    pools = tuple(_pool_plan(legs, best, number) for number in range(len(best.legs)))
    return Plan(
        model=model_summary(capture),
        cluster=_whole_cluster(legs, best, pools),
        parallelism=_parallelism(best.legs[0].parallelism, pp=len(best.cuts)),
        strategies=pools[0].strategies,
        placements=pools[0].placements,
        stages=_stage_plans(best, pools),
        pools=pools,
        recomputation=_recomputation(legs, best),
        prediction=_prediction(legs, best, pools),
        certificate=certificate,
        alternatives=tuple(_alternative(other, best) for other in result.runners_up),
        warnings=rule_warnings(capture.graph),
    )


def _pool_plan(legs: Legs, priced: PricedRoute, number: int) -> PoolPlan:
    leg, solved = priced.legs[number], priced.solved(number)
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


def _whole_cluster(legs: Legs, priced: PricedRoute, pools: Sequence[PoolPlan]) -> ClusterSummary:
    """The pools that are used as one machine: the memory of the devices that are fullest, and the mean of
    peaks and prices."""
    parts = [pool.cluster for pool in pools]
    num_devices = sum(part.num_devices for part in parts)
    prices = [part.price_usd_per_device_hour for part in parts]
    known = [price for price in prices if price is not None]
    weights = [part.num_devices / num_devices for part in parts]
    return ClusterSummary(
        id=legs.pools.id,
        name=legs.pools.name,
        device=" + ".join(part.device for part in parts),
        num_devices=num_devices,
        devices_per_node=max(part.devices_per_node for part in parts),
        memory_bytes=_fullest(priced).memory_bytes,
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


def _recomputation(legs: Legs, priced: PricedRoute) -> tuple[Recomputation, ...]:
    graph = legs.planners[0].capture.graph
    solved = (priced.solved(number) for number in range(len(priced.legs)))
    return tuple(part for each in solved for part in recomputation(graph, each.evaluated))


def _prediction(legs: Legs, priced: PricedRoute, pools: Sequence[PoolPlan]) -> Prediction:
    capture = legs.planners[0].capture
    batch = priced.legs[0].parallelism.global_batch
    flops = 3 * capture.graph.flops / 2 * batch  # a backward is two forwards
    cluster = _whole_cluster(legs, priced, pools)
    terms_s = dict(priced.step.terms)
    terms_s["send_recv"] += priced.step_s - priced.step.total_s
    return Prediction(
        software=legs.evaluators[0].era.name,
        step_s=priced.step_s,
        terms_s=terms_s,
        tokens_per_s=tokens_per_sample(capture) * batch / priced.step_s,
        model_flops_per_s_per_device=flops / priced.step_s / cluster.num_devices,
        mfu=model_flops_utilization(flops, priced.step_s, cluster.num_devices, cluster.peak_flops_per_s),
        peak_memory_bytes=_peak_bytes(_fullest(priced)),
    )


def _peak_bytes(leg: PricedLeg) -> float:
    return max(ledger.total_bytes for ledger in leg.ledgers)


def _fullest(priced: PricedRoute) -> PricedLeg:
    """The leg whose devices are fullest."""
    return max(priced.legs, key=lambda leg: _peak_bytes(leg) / leg.memory_bytes)


def _infeasible(legs: Legs, result: PoolsResult) -> InfeasibleError:
    """Why nothing fits: no pipeline does, and the pool with most memory does not by itself."""
    pool, found = max(
        result.tried_alone.items(),
        key=lambda each: (
            legs.pools.pools[each[0]].num_devices * legs.pools.pools[each[0]].device.memory_bytes
        ),
    )
    error = infeasible(legs.planners[pool], found)
    num_routes = result.num_candidates - len(legs.planners)
    message = (
        f"none of {num_routes} pipelines through {legs.pools.name} fits, nor does one pool alone. {error}"
    )
    return InfeasibleError(
        message, limit=error.limit, excess_bytes=error.excess_bytes, relaxations=error.relaxations
    )


def _alternative(other: PricedRoute, best: PricedRoute) -> Alternative:
    ratio = other.step_s / best.step_s
    leg = other.legs[0]
    return Alternative(
        label=" -> ".join(str(each.parallelism) for each in other.legs),
        parallelism=_parallelism(leg.parallelism, pp=len(other.cuts)),
        step_s=other.step_s,
        peak_memory_bytes=_peak_bytes(_fullest(other)),
        reason=f"{ratio:.2f}x slower: +{duration(other.step_s - best.step_s)}",
    )
