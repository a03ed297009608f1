"""The parts that shell scripts of all launchers share."""

from __future__ import annotations

from shlex import quote

from autopar.launch.spec import JobSpec

STRICT = "set -euo pipefail"


def exports(job: JobSpec) -> list[str]:
    """The job's variables. One that the caller has set already wins."""
    return [f'export {name}="${{{name}:-{_inside_quotes(value)}}}"' for name, value in job.env]


def torchrun_command(job: JobSpec, rendezvous: list[str]) -> str:
    """The torchrun call, one option a line; arguments of the script are passed on."""
    options = [f"--nnodes={job.num_nodes}", f"--nproc-per-node={job.nproc_per_node}", *rendezvous]
    program = " ".join([quote(job.script), *map(quote, job.script_args), '"$@"'])
    return " \\\n    ".join(["torchrun", *options, program])


def _inside_quotes(value: str) -> str:
    for special in ("\\", '"', "$", "`", "}"):
        value = value.replace(special, f"\\{special}")
    return value
