"""torchrun by hand: one script, started on every host."""

from __future__ import annotations

from autopar.launch.shell import STRICT, exports, torchrun_command
from autopar.launch.spec import JobSpec


def render(job: JobSpec) -> dict[str, str]:
    """`launch.sh`, by name."""
    return {"launch.sh": _single_node(job) if job.num_nodes == 1 else _multi_node(job)}


def _single_node(job: JobSpec) -> str:
    lines = [
        "#!/usr/bin/env bash",
        *([f"# {job.comment}"] if job.comment else []),
        "#",
        "# usage: ./launch.sh [arguments of the program]",
        STRICT,
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
        "",
        *exports(job),
        f"exec {torchrun_command(job, ['--standalone'])}",
    ]
    return "\n".join(lines) + "\n"


def _multi_node(job: JobSpec) -> str:
    rendezvous = [
        "--rdzv-backend=c10d",
        f"--rdzv-id={job.name}",
        f'--rdzv-endpoint="$head_host:${{RENDEZVOUS_PORT:-{job.rendezvous_port}}}"',
    ]
    lines = [
        "#!/usr/bin/env bash",
        *([f"# {job.comment}"] if job.comment else []),
        "#",
        f"# Start it on each of the {job.num_nodes} hosts with the name of the first.",
        "#",
        "# usage: ./launch.sh FIRST_HOST [arguments of the program]",
        STRICT,
        'head_host="${1:?usage: ./launch.sh FIRST_HOST [arguments of the program]}"',
        "shift",
        'cd "$(dirname "${BASH_SOURCE[0]}")"',
        "",
        *exports(job),
        f"exec {torchrun_command(job, rendezvous)}",
    ]
    return "\n".join(lines) + "\n"
