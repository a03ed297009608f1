"""`compile`: from a model to the program of its plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import graphs
from autopar import api
from autopar.errors import RewriteError
from autopar.plan import Plan
from autopar.rewrite.initial import NOTHING_KNOWN, Initial, initial_values
from autopar.rewrite.parity import NUM_STEPS, reference
from autopar.rewrite.program import Program, rewrite
from autopar.search.summaries import fingerprint
from costmodel import OptimizerPolicy
from graphs import Capture
from hardware_db import Cluster


def compile(  # the name users expect, as in torch.compile
    model: api.Model,
    plan: Plan | None = None,
    *,
    cluster: Cluster | str | Path | None = None,
    inputs: api.Inputs | None = None,
    global_batch: int | None = None,
    policy: OptimizerPolicy | str | None = None,
    name: str | None = None,
) -> Program:
    """A parallel torch program that trains `model`, the same mathematics on the plan's devices.

    Args:
        model: a module (with `inputs`), a capture, or a `ModelSpec`.
        plan: how; without one, the best plan for `cluster` and `global_batch` is searched first.
        cluster: where to train, as `autopar.plan` takes it. Only without `plan`.
        inputs: keyword tensors of the module's forward, labels included, or a function from a batch size to
        them. global_batch: samples in one optimizer step. Only without `plan`.
        policy: what training keeps of a parameter, as `autopar.plan` takes it. Only without `plan`, which has
        its own. name: what to call the model.

    Returns a `Program`: `.source` is the model as one rank runs it, `.save(dir)` writes everything torchrun
    needs.

    Raises RewriteError where the plan was made for another model or asks for something that cannot be
    emitted, and what `autopar.plan` raises.
    """
    if plan is not None:
        _check_alone({"cluster": cluster, "global_batch": global_batch, "policy": policy})
    capture = api.captured(model, inputs, name)
    if plan is None:
        if cluster is None or global_batch is None:
            raise RewriteError("without a plan, compile needs cluster= and global_batch= to search for one")
        plan = api.plan(capture, cluster, global_batch=global_batch, policy=policy)
    _check(plan, capture)
    return rewrite(capture, plan, _initial(model))


def _check_alone(others: Mapping[str, object]) -> None:
    given = [f"{name}=" for name, value in others.items() if value is not None]
    if given:
        raise RewriteError(
            f"the plan has its own {', '.join(given)}: drop {'it' if len(given) == 1 else 'them'}, or leave "
            "out plan= to search for one"
        )


def _check(plan: Plan, capture: Capture) -> None:
    """Raises RewriteError for the plan of another model, and for one that no program can be written for."""
    graph = capture.graph
    if plan.model.fingerprint != fingerprint(graph):
        raise RewriteError(
            f"the plan was made for {plan.model.name} with {plan.model.num_ops} ops and "
            f"{plan.model.num_parameters:,} parameters; this is {graph.name} with {len(graph.ops)} ops and "
            f"{graph.num_parameters:,} parameters, or other sizes or dtypes of inputs. Plan it anew, or pass "
            "the model as it was planned"
        )
    if plan.pools:
        kinds = ", ".join(pool.cluster.id for pool in plan.pools)
        raise RewriteError(
            f"the plan is a pipeline through {len(plan.pools)} pools of different devices ({kinds}), which "
            "can be planned and explained but not yet emitted; plan for one of them"
        )


def _initial(model: api.Model) -> Initial:
    """How the model initialises its parameters, as far as it tells."""
    if isinstance(model, Capture):
        return NOTHING_KNOWN
    return initial_values(model if isinstance(model, nn.Module) else model.build_without_memory())


def save_reference(
    program: Program,
    model: nn.Module,
    inputs: api.Inputs,
    directory: str | Path,
    *,
    num_steps: int = NUM_STEPS,
) -> Path:
    """Run the original model in this process for `num_steps` optimizer steps and save what it did, for the
    program's `parity.py` to be held against.

    The model must have real parameters and fit this machine. Returns the path of `reference.pt` in
    `directory`.
    """
    parallelism = program.plan.parallelism
    batch = graphs.inputs_of_any_batch(inputs)(parallelism.global_batch)
    did = reference(
        model,
        batch,
        parallelism.num_microbatches,
        program.loss_name,
        parallelism.dp,
        program.precision,
        num_steps,
    )
    path = Path(directory) / "reference.pt"
    torch.save(did, path)
    return path
