"""The plan for pools: what their search found, by names and with predictions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import fsum

from autopar.errors import InfeasibleError
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
from autopar.search.alternatives import alternatives
from autopar.search.attempts import PlannerOf, agree
from autopar.search.describe import (
    build_plan,
    certificate,
    parameter_placements,
    rates,
    recomputation,
    rule_warnings,
    stage_plan,
)
from autopar.search.infeasible import infeasible
from autopar.search.pin_costs import with_pin_costs
from autopar.search.placement import rank_groups
from autopar.search.pool_legs import Legs
from autopar.search.pool_outcome import PoolsResult
from autopar.search.pool_pin_costs import PoolPinPricer
from autopar.search.pool_prices import PricedLeg, PricedRoute, Prices
from autopar.search.pools import PoolSearch, Report
from autopar.search.summaries import cluster_summary, model_summary
from autopar.search.wording import duration
from hardware_db import Pools
from hardware_db.pools import collective_library


def plan_pools(
    planner_of: PlannerOf, pools: Pools, time_limit_s: float | None, report: Report, *, price_pins: bool
) -> Plan:
    """The best plan for pools: by a search of the shallow model, or of the full one where that did not tell
    the truth. Raises as `autopar.plan`."""
    started = time.monotonic()
    for shorten in (True, False):
        legs = Legs([planner_of(pool, shorten) for pool in pools.pools], pools)
        search = PoolSearch(legs, time_limit_s, report)
        result = search.run()
        plan = _through(legs, result, started) if result.best is not None else _alone(legs, result, started)
        if plan is not None:
            return with_pin_costs(plan, PoolPinPricer(search, result).costs()) if price_pins else plan
    raise AssertionError("at full depth the search prices what the plan is made of")


def _through(legs: Legs, result: PoolsResult, started: float) -> Plan | None:
    """The plan of a pipeline through pools; None where it takes another time at full depth."""
    assert result.best is not None
    best = Prices(legs).finished(result.best)
    if not best.fits or not agree(best.step_s, result.best.step_s):
        return None
    proof = certificate(result, best.step_s, legs.effort, time.monotonic() - started)
    return _pipeline(legs, best, proof, result)


def _alone(legs: Legs, result: PoolsResult, started: float) -> Plan | None:
    """The plan for one pool; None where it takes another time at full depth."""
    if result.alone is None:
        raise _infeasible(legs, result)
    pool, found = result.alone
    assert found.best is not None, "a pool by itself counts only with a plan"
    planner = legs.planners[pool]
    solved = planner.finish(found.best)
    step_s = solved.evaluated.step_s
    if not solved.evaluated.fits or not agree(step_s, found.best.evaluated.step_s):
        return None
    idle = " and ".join(each.id for number, each in enumerate(legs.pools.pools) if number != pool)
    return build_plan(
        planner,
        solved,
        certificate(result, step_s, legs.effort, time.monotonic() - started),
        alternatives(planner, found, solved.evaluated),
        [f"{idle} stays idle: every pipeline through it takes longer"],
    )


def _pipeline(legs: Legs, best: PricedRoute, certificate: Certificate, result: PoolsResult) -> Plan:
    """The plan of a pipeline through pools, priced at full depth."""
    capture = legs.planners[0].capture
    pools = tuple(_pool_plan(legs, best, number) for number in range(len(best.legs)))
    cluster = _whole_cluster(legs, best, pools)
    return Plan(
        model=model_summary(capture),
        cluster=cluster,
        parallelism=_parallelism(best.legs[0].parallelism, pp=len(best.cuts)),
        policy=legs.planners[0].policy,
        low_precision=legs.planners[0].programs.low_precision,
        strategies=pools[0].strategies,
        placements=pools[0].placements,
        stages=_stage_plans(best, pools),
        pools=pools,
        recomputation=_recomputation(legs, best),
        prediction=_prediction(legs, best, cluster),
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
    return tuple(
        stage_plan(index, priced.solved(number).evaluated.units(index), work, ledger, pool.cluster.id)
        for number, (leg, pool) in enumerate(zip(priced.legs, pools, strict=True))
        for index, (work, ledger) in enumerate(zip(leg.stages, leg.ledgers, strict=True), pool.first_stage)
    )


def _recomputation(legs: Legs, priced: PricedRoute) -> tuple[Recomputation, ...]:
    graph = legs.planners[0].capture.graph
    solved = (priced.solved(number) for number in range(len(priced.legs)))
    return tuple(part for each in solved for part in recomputation(graph, each.evaluated))


def _prediction(legs: Legs, priced: PricedRoute, cluster: ClusterSummary) -> Prediction:
    capture, num_samples = legs.planners[0].capture, priced.legs[0].parallelism.global_batch
    terms_s = dict(priced.step.terms)
    terms_s["send_recv"] += priced.step_s - priced.step.total_s
    return Prediction(
        software=legs.evaluators[0].era.name,
        step_s=priced.step_s,
        terms_s=terms_s,
        **rates(capture, num_samples, priced.step_s, cluster.num_devices, cluster.peak_flops_per_s),
        peak_memory_bytes=_peak_bytes(_fullest(priced)),
    )


def _peak_bytes(leg: PricedLeg) -> float:
    return max(ledger.total_bytes for ledger in leg.ledgers)


def _fullest(priced: PricedRoute) -> PricedLeg:
    """The leg whose devices are fullest."""
    return max(priced.legs, key=lambda leg: _peak_bytes(leg) / leg.memory_bytes)


def _infeasible(legs: Legs, result: PoolsResult) -> InfeasibleError:
    """Why nothing fits: no pipeline does, and the pool with most memory does not by itself."""
    clusters = legs.pools.pools
    pool = max(
        result.tried_alone, key=lambda pool: clusters[pool].num_devices * clusters[pool].device.memory_bytes
    )
    num_routes = result.num_candidates - len(legs.planners)
    return infeasible(
        legs.planners[pool],
        result.tried_alone[pool],
        before=f"none of {num_routes} pipelines through {legs.pools.name} fits, nor does one pool alone.",
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
