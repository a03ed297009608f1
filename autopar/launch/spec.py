"""One description of a job that every launcher renders."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any, Literal

import hardware_db
from autopar.errors import AutoparError, InvalidParallelismError
from autopar.plan import Plan

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class JobSpec:
    """What to run where.

    Attributes:
        name: name of the job, free of blanks.
        num_nodes, nproc_per_node: hosts, and ranks on each of them.
        comment: a line about the plan, for the head of a script.
        script: path of the program, relative to the script that starts it.
        script_args: arguments that the program always gets; those of the command line follow.
        env: variables to set, beside the caller's own.
        devices: "gpu" where the scheduler hands out GPUs; "none" where ranks are plain processes, or where
            the site knows its accelerators under another name (give it in `scheduler_options`).
        rendezvous_port: TCP port of the first host at which the hosts meet.
        time_limit_s: wall-clock limit of the job; None leaves the scheduler's default.
        scheduler_options: further options for the scheduler, such as "--partition=train".
    """

    name: str
    num_nodes: int
    nproc_per_node: int
    comment: str = ""
    script: str = "train.py"
    script_args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = (("OMP_NUM_THREADS", "1"),)
    devices: Literal["gpu", "none"] = "none"
    rendezvous_port: int = 29500
    time_limit_s: int | None = None
    scheduler_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.nproc_per_node < 1:
            raise AutoparError(
                f"a job needs hosts and ranks, got {self.num_nodes} nodes of {self.nproc_per_node} ranks"
            )
        if not 0 < self.rendezvous_port < 65536:
            raise AutoparError(f"rendezvous_port is a TCP port from 1 to 65535, got {self.rendezvous_port}")
        for key, _ in self.env:
            if not _NAME.fullmatch(key):
                raise AutoparError(f"{key!r} is no name of an environment variable")
        for text in (self.name, self.comment, *self.scheduler_options):
            if "\n" in text:
                raise AutoparError(f"a job's name, comment and options are single lines, got {text!r}")


def job_of(plan: Plan, **overrides: Any) -> JobSpec:
    """The job that runs the program of `plan`, with `overrides` of its fields.

    Ranks fill nodes in order, as the plan's mesh was priced. Raises AutoparError for an unknown field or a
    plan for several pools, InvalidParallelismError when the ranks are more than a node holds and do not fill
    whole nodes.
    """
    known = [field.name for field in fields(JobSpec)]
    if unknown := sorted(set(overrides) - set(known)):
        raise AutoparError(f"a job has no {', '.join(unknown)}; its fields are {', '.join(known)}")
    if plan.pools:
        kinds = ", ".join(pool.cluster.id for pool in plan.pools)
        raise AutoparError(
            f"the plan is a pipeline through {len(plan.pools)} pools of different devices ({kinds}): one job "
            "of equal nodes cannot run it, and there is no program for it yet; plan for one of the pools"
        )
    world_size, per_node = plan.parallelism.world_size, plan.cluster.devices_per_node
    nproc_per_node = min(world_size, per_node)
    num_nodes, rest = divmod(world_size, nproc_per_node)
    if rest:
        raise InvalidParallelismError(
            f"{world_size} ranks do not fill nodes of {per_node} devices ({world_size} = {num_nodes} * "
            f"{per_node} + {rest}); plan for a multiple of {per_node} devices"
        )
    settings: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", plan.model.name).strip("-") or "model",
        "num_nodes": num_nodes,
        "nproc_per_node": nproc_per_node,
        "comment": f"{plan.model.name} on {plan.cluster.id}: {plan.parallelism}, {plan.policy.name}",
        "devices": _devices(plan.cluster.device),
    }
    return JobSpec(**(settings | overrides))


def _devices(device: str) -> Literal["gpu", "none"]:
    try:
        kind = hardware_db.accelerator(device).kind
    except hardware_db.UnknownHardwareError:
        return "none"  # a device of the user's own cluster file
    return "gpu" if kind == "gpu" else "none"
