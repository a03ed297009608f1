"""Slurm: a batch script that starts torchrun once on every node.

Nodes meet at the first of the allocation. torchrun orders them by host name, so ranks lie on neighbouring
nodes in the order in which the mesh was priced. No NCCL variable is set: its own choice stands until somebody
measured better.
"""

from __future__ import annotations

from autopar.launch.shell import STRICT, exports, torchrun_command
from autopar.launch.spec import JobSpec


def render(job: JobSpec) -> dict[str, str]:
    """`job.sbatch`, by name."""
    rendezvous = [
        "--rdzv-backend=c10d",
        '--rdzv-id="$SLURM_JOB_ID"',
        f'--rdzv-endpoint="$head_host:${{RENDEZVOUS_PORT:-{job.rendezvous_port}}}"',
    ]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in _options(job)),
        "#",
        *([f"# {job.comment}"] if job.comment else []),
        "#",
        "# usage, in the directory of the program: sbatch job.sbatch [arguments of the program]",
        STRICT,
        'cd "${SLURM_SUBMIT_DIR:-.}"  # Slurm runs a copy of this script from its spool',
        "",
        *exports(job),
        'head_host="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"',
        f"srun --kill-on-bad-exit=1 {torchrun_command(job, rendezvous)}",
    ]
    return {"job.sbatch": "\n".join(lines) + "\n"}


def _options(job: JobSpec) -> list[str]:
    options = [f"--job-name={job.name}", f"--nodes={job.num_nodes}", "--ntasks-per-node=1"]
    if job.devices == "gpu":
        options.append(f"--gpus-per-node={job.nproc_per_node}")
    else:
        options.append(f"--cpus-per-task={job.nproc_per_node}")
    if job.time_limit_s is not None:
        options.append(f"--time={_clock(job.time_limit_s)}")
    # A node that fails puts the job back into the queue; its output goes on in the same file.
    options += ["--exclusive", "--requeue", "--open-mode=append", "--output=%x-%j.out"]
    return options + list(job.scheduler_options)


def _clock(seconds: int) -> str:
    minutes = -(-seconds // 60)
    days, minutes = divmod(minutes, 24 * 60)
    return f"{days}-{minutes // 60:02d}:{minutes % 60:02d}:00"
