"""Ranks at hand: processes for emitted programs that need not import torch.

Starting a process and importing torch takes several seconds, a step of a small model milliseconds. So a
server imports torch once, and the ranks of a program are forked from it. They end with the program: threads
of process groups, and what a compiler remembers, would outlive it.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch._C._distributed_c10d import TCPStore

USED_BY_PROGRAMS = (
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "torch.utils.checkpoint",
)
LONGEST_S = 300.0
"""What a program may take before its ranks count as waiting for each other."""

Task = tuple[str, tuple[str, ...], int]
"""A script, its arguments, and the number of ranks."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program: `equal`, `NOT EQUAL`, a traceback or why there is none; what rank 0 wrote."""

    verdict: str
    output: str


class RankPool:
    """A server of ranks, up to `close`."""

    def __init__(self) -> None:
        self._pipe, there = multiprocessing.Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-W", "ignore", "-m", "tests.autopar.rank_pool", str(there.fileno())]
        self._server = subprocess.Popen(
            command,
            env=environment,
            pass_fds=(there.fileno(),),
            stderr=subprocess.DEVNULL,  # torch and gloo tell again, at length, what the verdict says
        )
        there.close()

    def run(self, script: Path, num_ranks: int, *arguments: object) -> Outcome:
        """Run a script beside its modules on this many ranks, as torchrun would; exit code 0 is `equal`."""
        task: Task = str(script), tuple(map(str, arguments)), num_ranks
        self._pipe.send(task)
        return Outcome(*self._pipe.recv())

    def close(self) -> None:
        self._pipe.close()
        self._server.wait()


@cache
def shared_pool() -> RankPool:
    """The one that all tests of a process use."""
    pool = RankPool()
    atexit.register(pool.close)
    return pool


def _outcome(task: Task) -> tuple[str, str]:
    """The longest verdict of all ranks, so that `NOT EQUAL` goes before `equal`; and rank 0's output."""
    ranks = [_forked(rank, task) for rank in range(task[2])]
    # Where they meet: a thread of this process, so it begins after the forks. A lock that it held in that
    # moment, such as that of the resolver of host names, would stay locked in a rank.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    try:
        for _, pipe in ranks:
            pipe.send(store.port)
        return _judged({pipe: rank for rank, (_, pipe) in enumerate(ranks)})
    finally:
        for process, pipe in ranks:
            process.kill()
            process.join()
            pipe.close()


def _forked(rank: int, task: Task) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_run_as, args=(rank, task, there), daemon=True)
    process.start()
    there.close()
    return process, here


def _judged(waiting: dict[Connection, int]) -> tuple[str, str]:
    outcomes: dict[int, tuple[str, str]] = {}
    while waiting:
        ready = [each for each in wait(list(waiting), LONGEST_S) if isinstance(each, Connection)]
        for pipe in ready:
            outcomes[waiting.pop(pipe)] = _received(pipe)
        broken = [each for each in outcomes.values() if each[0] not in {"equal", "NOT EQUAL"}]
        if broken or not ready:  # the others may wait for this one
            return broken[0] if broken else (f"did not finish in {LONGEST_S:.0f} s", "")
    return max((verdict for verdict, _ in outcomes.values()), key=len), outcomes[0][1]


def _received(pipe: Connection) -> tuple[str, str]:
    try:
        verdict, output = pipe.recv()
    except (EOFError, ConnectionError):
        return "a rank died", ""
    return verdict, output


def _run_as(rank: int, task: Task, pipe: Connection) -> None:
    """One rank, with the environment of torchrun, once it hears where the ranks meet."""
    script, arguments, num_ranks = task
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(pipe.recv()),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    pipe.send(_run(script, arguments))


def _run(script: str, arguments: Sequence[str]) -> tuple[str, str]:
    sys.path[0] = str(Path(script).parent)
    sys.argv = [script, *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            runpy.run_path(script, run_name="__main__")
            verdict = "equal"
        except SystemExit as finished:
            verdict = "NOT EQUAL" if finished.code else "equal"
        except Exception as error:  # what went wrong first is the verdict
            first: BaseException = error
            while first.__cause__ is not None:
                first = first.__cause__
            verdict = "".join(traceback.format_exception(first, chain=False))
    return verdict, output.getvalue()


def _serve(pipe: Connection) -> None:
    """The server: runs tasks until the pipe closes."""
    for module in USED_BY_PROGRAMS:
        import_module(module)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            pipe.send(_outcome(pipe.recv()))


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
