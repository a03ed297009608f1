"""Run `parity.py` of several programs, one after the other, in the same ranks: starting torch takes longer
than they do.

torchrun --nproc-per-node N run_programs.py DIRECTORY...

Rank 0 prints a line for every program: its directory, and `equal` or what went wrong.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback

import torch.distributed as dist

PROGRAM_MODULES = ("autopar_runtime", "model", "train")


def run(directory: str) -> str:
    """What became of one program: `equal`, or what its parity test said."""
    for module in PROGRAM_MODULES:
        sys.modules.pop(module, None)
    sys.path[0] = directory
    sys.argv = ["parity.py"]
    try:
        runpy.run_path(f"{directory}/parity.py", run_name="__main__")
    except SystemExit as finished:
        return "equal" if finished.code == 0 else "NOT EQUAL"
    except Exception:  # the traceback is the verdict, and the test fails on it
        return traceback.format_exc()
    return "no verdict"


def keep_the_process_group() -> None:
    """Join once for all programs: they call these, and would each need a port of its own."""
    dist.init_process_group("gloo")
    dist.init_process_group = lambda *_, **__: None
    dist.destroy_process_group = lambda *_, **__: None


if __name__ == "__main__":
    directories = sys.argv[1:]
    keep_the_process_group()
    for directory in directories:
        verdict = run(directory)
        print(f"\n[rank {os.environ['RANK']}] {directory}: {verdict}", flush=True)
        if verdict not in {"equal", "NOT EQUAL"}:
            os._exit(1)  # the other ranks may wait for this one
    os._exit(0)
