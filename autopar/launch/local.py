"""Ranks on this machine, now: torchrun in a child process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_local(
    script: str | Path, num_ranks: int, arguments: Sequence[str] = (), *, timeout_s: float | None = None
) -> int:
    """Run `script` with `num_ranks` ranks of one thread each; returns the exit code.

    Output of the ranks goes where this process's goes. Raises subprocess.TimeoutExpired.
    """
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"),
        str(script),
        *arguments,
    ]
    sys.stdout.flush()
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run(command, env=environment, check=False, timeout=timeout_s).returncode
