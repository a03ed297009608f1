"""The report as plain text: verdict first, aligned tables, at most `WIDTH` columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from textwrap import wrap

from autopar.report import units
from autopar.report.table import INDENT, table
from autopar.report.values import (
    PinPrice,
    Pool,
    Ranks,
    Recomputed,
    Report,
    RunnerUp,
    Search,
    SearchLayer,
    Stage,
    Training,
    Verdict,
)

WIDTH = 100


def render(report: Report) -> str:
    """The report in sections; ends in a newline."""
    sections = [
        _head(report),
        _warnings(report.warnings),
        _training(report.training),
        _pools(report.pools) or _mesh(report),
        _stages(report.stages),
        _recomputation(report.recomputation),
        _placements(report),
        _operations(report),
        _costs(report),
        _memory(report),
        _runners_up(report.runners_up),
        _pins(report.pins),
        _search(report.search, report.verdict),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _head(report: Report) -> list[str]:
    v = report.verdict
    rate = units.flops_per_s(v.model_flops_per_s_per_device)
    rows = [
        ("plan", v.parallelism),
        ("step time", f"{units.seconds(v.step_s)} for {report.global_batch:,} samples"),
        ("throughput", f"{units.number(v.tokens_per_s)} tokens/s"),
        ("model FLOPs", f"{rate} per device, MFU {units.percent(v.mfu)}"),
        ("peak memory", _peak(v)),
        ("exposed communication", f"{units.seconds(v.exposed_communication_s)}, "
                                  f"{units.percent(v.exposed_communication_s / v.step_s)} of the step"),
    ]  # fmt: skip
    if v.scale_factor is not None:
        rows.append(
            ("scale factor", f"{v.scale_factor:.3f} = T_{report.num_devices} / ({report.num_devices} T_1)")
        )
    title = (
        f"{report.model} ({units.count(report.num_parameters)} parameters) on {report.cluster} "
        f"({report.num_devices} x {report.device})"
    )
    return [
        *wrap(title, WIDTH),
        *wrap(f"verdict: {_status(v)}", WIDTH, subsequent_indent=INDENT),
        *table(rows),
    ]


def _status(verdict: Verdict) -> str:
    if not verdict.fits:
        over_bytes = verdict.peak_memory_bytes - verdict.memory_bytes
        if over_bytes <= 0:
            return "does not fit: offloaded states are more than the hosts' memory"
        return f"does not fit: {units.gigabytes(over_bytes)} over the memory of a device"
    if verdict.status == "evaluated":
        return "fits; evaluated as asked, no search was made"
    if verdict.gap < 5e-4:
        return f"{verdict.status} under the cost model"
    return f"{verdict.status}; at most {units.percent(verdict.gap)} from the optimum of the cost model"


def _peak(verdict: Verdict) -> str:
    share = units.percent(verdict.peak_memory_bytes / verdict.memory_bytes)
    return (
        f"{units.gigabytes(verdict.peak_memory_bytes)} of {units.gigabytes(verdict.memory_bytes)} ({share})"
    )


def _warnings(warnings: Iterable[str]) -> list[str]:
    return [line for text in warnings for line in wrap(f"warning: {text}", WIDTH, subsequent_indent=INDENT)]


def _training(training: Training | None) -> list[str]:
    if training is None:
        return []
    rows = [
        ("as predicted", units.seconds(training.predicted_s)),
        (f"by {training.formula}", units.seconds(training.formula_s)),
    ]
    if training.price_usd is not None:
        rows.append(("price", f"{training.price_usd:,.0f} USD at the list price per device and hour"))
    return [f"training on {units.count(training.tokens)} tokens", *table(rows)]


def _mesh(report: Report) -> list[str]:
    axes = [
        (axis.name, str(axis.size), "inside a node" if axis.within_node else "across nodes", axis.meaning)
        for axis in report.axes
    ]
    product = " x ".join(str(axis.size) for axis in report.axes)
    titles = ("mesh: one rank", f"mesh: {report.num_devices} ranks")
    title = f"mesh: {product} = {report.num_devices} ranks, outermost axis first"
    title = titles[len(axes)] if len(axes) < len(titles) else title
    return [title, *table(axes), *table(report.settings), *_ranks(report.ranks)]


def _pools(pools: Sequence[Pool]) -> list[str]:
    """The legs of a pipeline through pools: nothing else reaches out of one."""
    lines = []
    for pool in pools:
        last = pool.first_stage + pool.num_stages - 1
        stages = f"stages {pool.first_stage}-{last}" if pool.num_stages > 1 else f"stage {last}"
        ranks = f"ranks {pool.first_rank}-{pool.first_rank + pool.num_devices - 1}"
        lines.append(
            f"{INDENT}{pool.cluster}: {stages} on {ranks}, {pool.num_devices} x {pool.device}, "
            f"{pool.collective_library}"
        )
        lines += [2 * INDENT + pool.parallelism, *(INDENT + line for line in _ranks(pool.ranks))]
    return ["pools, in the order of the pipeline (groups by ranks of the pool)", *lines] if lines else []


def _ranks(ranks: Sequence[Ranks]) -> list[str]:
    """Who communicates along each axis; lines, as there may be many levels of links."""
    lines = (f"{each.axis}: {each.num_groups} groups, ranks {each.first} on {each.links}" for each in ranks)
    return [
        wrapped
        for line in lines
        for wrapped in wrap(line, WIDTH, initial_indent=INDENT, subsequent_indent=2 * INDENT)
    ]


def _stages(stages: Sequence[Stage]) -> list[str]:
    if len(stages) < 2:
        return []
    rows = [("stage", "rank", "forward", "backward", "memory", "modules")]
    for stage in stages:
        first, *rest = wrap(", ".join(stage.modules), 50) or [""]
        times = units.seconds(stage.forward_s), units.seconds(stage.backward_s)
        rows.append(
            (str(stage.index), str(stage.rank), *times, units.gigabytes(stage.peak_memory_bytes), first)
        )
        rows += [("", "", "", "", "", line) for line in rest]
    return ["stages (times per microbatch)", *table(rows)]


def _recomputation(recomputation: Sequence[Recomputed]) -> list[str]:
    if not recomputation:
        return []
    rows: list[tuple[str, ...]] = []
    for each in recomputation:
        blocks, what = wrap(", ".join(each.blocks), 30), wrap(each.what, 60)
        rows += zip_longest(blocks, what, fillvalue="")
    return ["computed again in the backward (blocks not listed keep all)", *table(rows)]


def _placements(report: Report) -> list[str]:
    lines = []
    for block in report.blocks:
        lines.append(f"{INDENT}{block.path or '(the root)'}")
        lines += table([(p.parameter, p.placement) for p in block.placements], indent=2 * INDENT)
    return ["parameters (S(d): split along dimension d; R: whole on every rank)", *lines] if lines else []


def _operations(report: Report) -> list[str]:
    """Ops that some axis splits; the data axes, where all follow the batch, as a count."""
    if not report.operations:
        return []
    axes = [axis for axis, _ in report.operations[0].strategies if axis != "dp"]
    rows = [("op", "count", *axes)]
    for op in report.operations:
        chosen = dict(op.strategies)
        if any(not chosen[axis].startswith("replicate") for axis in axes):
            rows.append((op.kind, str(op.count), *(chosen[axis] for axis in axes)))
    lines = ["ops and the factor that an axis splits (one instance of each repeated block)"]
    if len(rows) > 1:
        lines += table(rows, right=(1,))
    whole = sum(op.count for op in report.operations) - sum(int(row[1]) for row in rows[1:])
    if axes and whole:
        lines.append(f"{INDENT}{whole} more run whole on every rank of {', '.join(axes)}")
    if (data := [(op.count, dict(op.strategies).get("dp", "")) for op in report.operations]) and data[0][1]:
        split = sum(count for count, key in data if not key.startswith("replicate"))
        lines.append(f"{INDENT}dp: {split} of {sum(count for count, _ in data)} ops follow the batch")
    return lines


def _costs(report: Report) -> list[str]:
    rows = [
        (term.name.replace("_", " "), units.seconds(term.seconds), units.percent(term.share))
        for term in report.terms
    ]
    rows.append(("sum", units.seconds(sum(term.seconds for term in report.terms)), units.percent(1.0)))
    return ["costs of a step (communication: what nothing hides)", *table(rows, right=(1, 2))]


def _memory(report: Report) -> list[str]:
    if not report.stages:
        return []
    fullest = max(report.stages, key=lambda stage: stage.peak_memory_bytes)
    rows = [(name.replace("_", " "), units.gigabytes(value)) for name, value in fullest.memory_bytes if value]
    rows.append(("sum", units.gigabytes(fullest.peak_memory_bytes)))
    where = f", stage {fullest.index}" if len(report.stages) > 1 else ""
    return [f"memory of the fullest device{where}", *table(rows, right=(1,))]


def _runners_up(runners_up: Sequence[RunnerUp]) -> list[str]:
    if not runners_up:
        return []
    rows = []
    for other in runners_up:
        plan = (
            other.parallelism if other.label == other.parallelism else f"{other.label}: {other.parallelism}"
        )
        time = "-" if other.step_s is None else units.seconds(other.step_s)
        memory = "-" if other.peak_memory_bytes is None else units.gigabytes(other.peak_memory_bytes)
        rows.append((plan, time, memory))
    lines = []
    for line, other in zip(table(rows, right=(1, 2)), runners_up, strict=True):
        lines += [line, *wrap(other.reason, WIDTH, initial_indent=2 * INDENT, subsequent_indent=2 * INDENT)]
    return ["runners-up, and why they lost", *lines]


def _pins(pins: Sequence[PinPrice]) -> list[str]:
    if not pins:
        return []
    rows = [("pin", "without it", "with it", "costs")]
    for each in pins:
        costs = f"+{each.cost_s / each.step_s:.1%}" if each.cost_s > 0 else "nothing"
        first, *rest = wrap(each.pin, 60)
        rows.append((first, units.seconds(each.step_s), units.seconds(each.step_s + each.cost_s), costs))
        rows += [(line, "", "", "") for line in rest]
    return ["what each pin costs a step, the others kept", *table(rows, right=(1, 2, 3))]


def _search(search: Search, verdict: Verdict) -> list[str]:
    if verdict.status == "evaluated":
        return []
    pruned = ", ".join(f"{number:,} by {reason}" for reason, number in search.pruned if number)
    text = f"search: {search.num_candidates:,} candidates, {search.num_solved:,} solved"
    text += f", pruned: {pruned}" if pruned else ""
    text += f"; no plan can be faster than {units.seconds(search.bound_s)}"
    return [*wrap(text, WIDTH, subsequent_indent=INDENT), *_layers(search.layers)]


def _layers(layers: Sequence[SearchLayer]) -> list[str]:
    """What each layer had to solve; no sizes where nothing is chosen, no times of a plan from a file."""
    if not layers:
        return []
    rows: list[tuple[str, ...]] = [("layer", "problems", "variables", "rows", "integer", "CPU time")]
    for each in layers:
        sizes = (each.num_variables, each.num_rows, each.num_integer)
        rows.append(
            (
                each.name,
                f"{each.num_problems:,}",
                *(f"{size:,}" if each.num_variables else "-" for size in sizes),
                "-" if each.cpu_s is None else units.seconds(each.cpu_s),
            )
        )
    return [f"{INDENT}problems of each layer, and the size of the largest", *table(rows, right=range(1, 6))]
