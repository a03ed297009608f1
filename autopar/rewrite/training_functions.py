"""The functions of `train.py`, each with only the parts that its plan needs."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import indent
from typing import NamedTuple

from autopar.rewrite.facts import TrainingFacts
from costmodel.orders import SPLIT_BACKWARD_SCHEDULES


class _Held(NamedTuple):
    """Something that a rank holds: the field of `Rank`, the lines of `build` that make it, and what to say
    of it."""

    name: str
    annotation: str
    made: str
    comment: str = ""


def _held(facts: TrainingFacts) -> Iterator[_Held]:
    """What a rank holds beside its mesh and its stages, in the order in which it is made."""
    if facts.parallelism.pp > 1:
        yield _Held("schedule", "PipelineSchedule", _schedule(facts))
    if facts.ties:
        yield _Held(
            "tied",
            "list[Tied]",
            "    tied = tied_parameters(stages, TIES, RANKS_OF_STAGES, mesh)\n",
            "  # parameters that several stages have copies of",
        )
    if facts.has_buckets:
        made = _summed_parameters(facts) + _buckets("gradients", "parameters", facts.data_axis)
        yield _Held("gradients", "GradientBuckets", made)
    if facts.expert_axis:
        made = _buckets("expert_gradients", "apart", facts.expert_axis)
        yield _Held("expert_gradients", "GradientBuckets", made, "  # summed over fewer ranks")
    if facts.precision.needs_loss_scale:
        made = """\
    loss_scale = LossScale()
    if len(STAGES) - 1 in stages:
        loss_scale.scale_output(stages[len(STAGES) - 1])
"""
        yield _Held("loss_scale", "LossScale", made)


def _schedule(facts: TrainingFacts) -> str:
    name, precision = facts.parallelism.schedule, facts.precision
    splitting = ", leave_weights" if name in SPLIT_BACKWARD_SCHEDULES else ""
    if splitting and facts.has_master_shards and precision.gradient != precision.compute:
        splitting = ", lambda stage: leave_weights(stage, PRECISION.gradient)"
    arguments = f'stages, BORDERS, "{name}", NUM_MICROBATCHES, mesh, device{splitting}'
    return f"    schedule = pipeline({arguments})\n"


def _summed_parameters(facts: TrainingFacts) -> str:
    """The parameters whose gradients are summed over all replicas, those of dealt out experts `apart`."""
    if facts.parallelism.ep == 1:
        return """\
    parameters = [each for stage in stages.values() for each in stage.parameters()]
"""
    return """\
    apart = dict.fromkeys(each for stage in stages.values() for each in experts_of(stage, PLACEMENTS))
    parameters = [each for stage in stages.values() for each in stage.parameters() if each not in apart]
"""


def _buckets(name: str, parameters: str, axis: str | None) -> str:
    return f"""\
    {name} = GradientBuckets({parameters}, mesh.get_group("{axis}"), NUM_MICROBATCHES)
"""


def rank_class(facts: TrainingFacts) -> str:
    """The class that holds what a rank has."""
    fields = ["mesh: DeviceMesh", "stages: dict[int, nn.Module]"]
    fields += [f"{each.name}: {each.annotation}{each.comment}" for each in _held(facts)]
    return f'''\
@dataclass(frozen=True)
class Rank:
    """What one rank holds: its stages of the model by number, and what it runs them with."""

{indent(chr(10).join(fields), "    ")}

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of this rank, by the names they have in the original model."""
        stages = self.stages.values()
        return {{
            name: each for stage in stages for name, each in stage.named_parameters(remove_duplicate=False)
        }}'''


def build_function(facts: TrainingFacts) -> str:
    """The function that builds it."""
    aliases = ", ALIASES" if facts.aliases else ""
    initial = ", INITIAL" if facts.initial else ""
    mine, stages = "", "{0: STAGES[0](mesh)}"
    if facts.parallelism.pp > 1:
        mine = (
            "    mine = [index for index, rank in enumerate(RANKS_OF_STAGES)"
            ' if rank == mesh.get_local_rank("pp")]\n'
        )
        stages = "{index: STAGES[index](mesh) for index in mine}"
    others = list(_held(facts))
    arguments = ", ".join(["mesh", "stages", *(each.name for each in others)])
    return f'''\
def build(device: torch.device, weights: Mapping[str, Any] | Path | None) -> Rank:
    """This rank, with its part of the original model's `weights` (fresh ones if None)."""
    mesh = make_mesh(device.type, MESH)
{mine}\
    with torch.device("meta"):  # no memory before it is clear which part this rank holds
        stages: dict[int, nn.Module] = {stages}
    for stage in stages.values():
{_sharding(facts)}\
        allocate(stage, device)
        if weights is None:
            initialize(stage, mesh, PLACEMENTS{initial})
        else:
            load(stage, weights, mesh, PLACEMENTS{aliases})
{_gradient_dtype(facts)}\
{"".join(each.made for each in others)}\
    return Rank({arguments})'''


def _sharding(facts: TrainingFacts) -> str:
    plan = facts.parallelism
    if not plan.zero_stage:
        return ""
    precision = ", precision=PRECISION" if facts.has_master_shards else ""
    experts = ", experts=experts_of(stage, PLACEMENTS)" if plan.ep > 1 else ""
    options = f"zero_stage={plan.zero_stage}{precision}{experts}"
    return f"        shard_parameters(stage, BLOCKS, mesh, {options})\n"


def _gradient_dtype(facts: TrainingFacts) -> str:
    if facts.precision.gradient == facts.precision.compute or facts.has_master_shards:
        return ""
    return f"""\
        for parameter in stage.parameters():
            parameter.grad_dtype = {facts.precision.gradient}
"""


def step_function(facts: TrainingFacts) -> str:
    """The function that computes loss and gradients of a step."""
    body = "".join(f"    rank.{name}.clear()\n" for name in _names_of_buckets(facts))
    body += _pipelined(facts) if facts.parallelism.pp > 1 else _accumulated(facts)
    return f'''\
def forward_backward(rank: Rank, batch: dict[str, Tensor]) -> Tensor:
    """Leave the gradients of the mean loss over the global batch; `batch` is the part of this rank's replica.

    Returns that loss, on every rank.
    """
{body}{_reductions(facts)}    return total'''


def _names_of_buckets(facts: TrainingFacts) -> list[str]:
    return [each.name for each in _held(facts) if each.annotation == "GradientBuckets"]


def _pipelined(facts: TrainingFacts) -> str:
    return f"""\
    losses: list[Tensor] = []
    if len(STAGES) - 1 in rank.stages:
        unread = next(iter(batch.values()))  # the last stage computes the loss itself; no target is read
        rank.schedule.step(batch=batch, target=unread, losses=losses, return_outputs=False)
    else:
        rank.schedule.step(batch=batch, return_outputs=False)
    device = next(iter(batch.values())).device
    total = sum((loss.detach() for loss in losses), torch.zeros((), dtype={facts.loss_dtype}, device=device))
"""


def _accumulated(facts: TrainingFacts) -> str:
    plan = facts.parallelism
    if plan.num_microbatches == 1:
        return """\
    loss: Tensor = rank.stages[0](**batch)
    loss.backward()
    total = loss.detach().clone()
"""
    holds = (
        "        hold_until_last(rank.stages[0], index == NUM_MICROBATCHES - 1, "
        f"zero_stage={plan.zero_stage})\n"
        if plan.zero_stage in (1, 2)
        else ""
    )
    return f"""\
    losses = []
    for index in range(NUM_MICROBATCHES):
        rows = slice(index * MICROBATCH, (index + 1) * MICROBATCH)
{holds}\
        loss = rank.stages[0](**{{name: each[rows] for name, each in batch.items()}}) / NUM_MICROBATCHES
        loss.backward()
        losses.append(loss.detach())
    total = torch.stack(losses).sum()
"""


def _reductions(facts: TrainingFacts) -> str:
    """What is summed over ranks: partial gradients, gradients of replicas, of tied parameters, and the
    loss."""
    text = ""
    if facts.has_buckets:  # first: the other sums read what is reduced while the backward runs
        text += "".join(f"    rank.{name}.reduce()\n" for name in _names_of_buckets(facts))
    if facts.parallelism.zero_stage and facts.has_whole_parameters:
        text += f"""\
    for stage in rank.stages.values():
        sum_gradients(unsharded_parameters(stage), rank.mesh.get_group("{facts.data_axis}"))
"""
    if facts.partial_gradients:
        text += """\
    for axis, names in PARTIAL_GRADIENTS.items():
        for stage in rank.stages.values():
            sum_gradients(matching(stage, names), rank.mesh.get_group(axis))
"""
    if facts.ties:
        text += """\
    sum_tied_gradients(rank.tied)
"""
    for axis in facts.loss_axes:
        text += f'    dist.all_reduce(total, group=rank.mesh.get_group("{axis}"))\n'
    if facts.precision.needs_loss_scale:
        text += "    rank.loss_scale.unscale(rank.parameters().values())\n"
    return text


def main_function(facts: TrainingFacts) -> str:
    """The loop over steps, and its end."""
    aliases = ", ALIASES" if facts.aliases else ""
    tokens = f', "{facts.tokens[0]}", "{facts.tokens[1]}"' if facts.tokens else ""
    further = ", further_copies(rank.tied)" if facts.ties else ""
    step, scale, resumed = "        optimizer.step()\n", "", ""
    if facts.precision.needs_loss_scale:
        step = "        if rank.loss_scale.is_good(float(norm)):\n            optimizer.step()\n"
        scale = ", loss_scale=rank.loss_scale.state"
        resumed = '    rank.loss_scale.state = progress.get("loss_scale", rank.loss_scale.state)\n'
    return f"""\
def main() -> None:
    options = training_options(__doc__)
    device = start()
    rank = build(device, options.weights)
    if options.compile:
        compile_stages(rank.stages.values())
    optimizer = OPTIMIZER(
        dict.fromkeys(rank.parameters().values()), betas=options.betas, weight_decay=options.weight_decay
    )
    trained = Trained(tuple(rank.stages.values()), optimizer, rank.mesh, PLACEMENTS{aliases})
    checkpoints = Checkpoints(options.checkpoints)
    progress = checkpoints.resume(trained)
{resumed}\
    samples = open_data(options, INPUTS{tokens})
    first = progress.get("step", 0)
    data = batches(samples, rank.mesh, MICROBATCH * NUM_MICROBATCHES, first, options)
    log = Log(EXPECTED, options)
    last = first  # steps taken
    for step, batch in zip(range(first, options.steps), data, strict=False):
        seed_step(step, rank.mesh, options)
        rate = set_learning_rate(optimizer, step, options)
        loss = forward_backward(rank, {{name: each.to(device) for name, each in batch.items()}})
        norm = clip_gradients(trained.stages, options.clip, rank.mesh, PLACEMENTS{further})
{step}\
        optimizer.zero_grad()
        last = step + 1
        log.step(last, loss=loss, gradient_norm=norm, learning_rate=rate)
        if last % options.save_every == 0:
            checkpoints.save(last, trained{scale})
    if last > first and last % options.save_every:
        checkpoints.save(last, trained{scale})
    log.end(last)
    checkpoints.wait()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()"""
