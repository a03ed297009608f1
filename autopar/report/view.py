"""What there is to say about a plan, worked out once: the renderers only lay it out."""

from __future__ import annotations

from autopar.errors import AutoparError
from autopar.module_paths import module_ranges
from autopar.plan import Certificate, Plan, Recomputation
from autopar.report.mesh import axes, pools, ranks, settings
from autopar.report.sharding import blocks, operations
from autopar.report.values import (
    PinPrice,
    Recomputed,
    Report,
    RunnerUp,
    Search,
    SearchLayer,
    Stage,
    Term,
    Training,
    Verdict,
)
from costmodel import end_to_end_training_s, scale_factor, stage_ranks

COMPUTING = frozenset({"compute", "recompute", "pipeline_bubble", "optimizer"})
"""Terms of a step that are no communication; every other term is communication that nothing hides."""


def view(plan: Plan, token_budget: float | None = None) -> Report:
    """The report of `plan`; with `token_budget`, the training time for that many tokens.

    Raises AutoparError for a budget that is not positive.
    """
    return Report(
        model=plan.model.name,
        num_parameters=plan.model.num_parameters,
        cluster=plan.cluster.name,
        num_devices=_num_devices(plan),
        device=plan.cluster.device,
        global_batch=plan.parallelism.global_batch,
        tokens_per_step=plan.parallelism.global_batch * plan.model.tokens_per_sample,
        verdict=_verdict(plan),
        training=None if token_budget is None else _training(plan, token_budget),
        axes=axes(plan),
        ranks=ranks(plan.rank_groups),
        settings=settings(plan),
        pools=pools(plan),
        blocks=blocks(plan),
        operations=operations(plan),
        stages=_stages(plan),
        recomputation=tuple(
            Recomputed(module_ranges(each.blocks), _computed_again(each)) for each in plan.recomputation
        ),
        terms=_terms(plan),
        runners_up=tuple(
            RunnerUp(a.label, str(a.parallelism), a.step_s, a.peak_memory_bytes, a.reason)
            for a in plan.alternatives
        ),
        pins=tuple(PinPrice(each.pin, each.step_s, each.cost_s) for each in plan.pin_costs),
        search=_search(plan.certificate),
        warnings=plan.warnings,
    )


def _computed_again(each: Recomputation) -> str:
    """What blocks compute again, in words."""
    if each.mode == "kept":
        return f"all but {', '.join(each.labels)}"
    return {
        "attention": "the probabilities of attention",
        "alternate": "all but attention, what was received and every second matrix product",
        "selective": "all but matrix products, attention and what was received",
        "full": "all",
    }[each.mode]


def _verdict(plan: Plan) -> Verdict:
    predicted, world_size = plan.prediction, _num_devices(plan)
    exposed_s = sum(seconds for name, seconds in predicted.terms_s.items() if name not in COMPUTING)
    scaling = None
    if predicted.single_device_step_s is not None:
        samples = plan.parallelism.global_batch
        scaling = scale_factor(
            samples / predicted.single_device_step_s, samples / predicted.step_s, world_size
        )
    return Verdict(
        status=plan.certificate.status,
        gap=plan.certificate.gap,
        fits=plan.fits,
        parallelism=" -> ".join(str(pool.parallelism) for pool in plan.pools) or str(plan.parallelism),
        step_s=predicted.step_s,
        tokens_per_s=predicted.tokens_per_s,
        mfu=predicted.mfu,
        model_flops_per_s_per_device=predicted.model_flops_per_s_per_device,
        peak_memory_bytes=predicted.peak_memory_bytes,
        memory_bytes=plan.cluster.memory_bytes,
        exposed_communication_s=exposed_s,
        scale_factor=scaling,
    )


def _training(plan: Plan, tokens: float) -> Training:
    """Both figures for `tokens`.

    In the formula X counts the FLOPs that a device really executes. With full recomputation these are 8/6 of
    the model's own, so X is that much higher than the model FLOP rate that the plan states.
    """
    if not tokens > 0:
        raise AutoparError(f"a token budget is a positive number, got {tokens:g}")
    recompute = plan.parallelism.recompute == "full"
    executed_flops_per_s = plan.prediction.model_flops_per_s_per_device * (8 / 6 if recompute else 1)
    world_size = _num_devices(plan)
    predicted_s = tokens / plan.prediction.tokens_per_s
    price = plan.cluster.price_usd_per_device_hour
    return Training(
        tokens=tokens,
        predicted_s=predicted_s,
        formula="8TP/(nX)" if recompute else "6TP/(nX)",
        formula_s=end_to_end_training_s(
            tokens, plan.model.num_parameters, world_size, executed_flops_per_s, recompute
        ),
        price_usd=None if price is None else price * world_size * predicted_s / 3600,
    )


def _num_devices(plan: Plan) -> int:
    """Devices that the plan uses."""
    return plan.cluster.num_devices if plan.pools else plan.parallelism.world_size


def _stages(plan: Plan) -> tuple[Stage, ...]:
    p = plan.parallelism
    ranks = stage_ranks(p.schedule, p.pp, p.num_virtual_stages)
    return tuple(
        Stage(
            stage.index,
            ranks[stage.index],
            stage.modules,
            stage.forward_s,
            stage.backward_s,
            stage.peak_memory_bytes,
            tuple(stage.memory_bytes.items()),
        )
        for stage in plan.stages
    )


def _terms(plan: Plan) -> tuple[Term, ...]:
    step_s = plan.prediction.step_s
    terms = [
        Term(name, seconds, seconds / step_s) for name, seconds in plan.prediction.terms_s.items() if seconds
    ]
    return tuple(sorted(terms, key=lambda term: -term.seconds))


def _search(certificate: Certificate) -> Search:
    return Search(
        certificate.num_candidates,
        certificate.num_solved,
        tuple(certificate.pruned.items()),
        certificate.bound_s,
        tuple(
            SearchLayer(
                each.layer, each.num_problems, each.num_variables, each.num_rows, each.num_integer, each.cpu_s
            )
            for each in certificate.layers
        ),
    )
