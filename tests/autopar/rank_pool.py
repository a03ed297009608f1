"""Ranks that stay: processes that run one emitted program after the other.

Starting a process and importing torch takes several seconds, a step of a small model milliseconds. The ranks
of a pool are forked from a server that has imported torch once. For every program they join a new process
group, so nothing is left of the one before; after a program that broke off or hung they are replaced.
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

PROGRAM_MODULES = ("autopar_runtime", "model", "train")
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


class _Ranks:
    """The processes, in the server."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("fork")
        self._ranks: list[tuple[BaseProcess, Connection]] = []

    def run(self, task: Task) -> tuple[str, str]:
        """The longest verdict of all ranks, so that `NOT EQUAL` goes before `equal`; and rank 0's output."""
        _, _, num_ranks = task
        self._start(num_ranks)
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # where the ranks meet
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks[:num_ranks])}
        for pipe in waiting:
            pipe.send((task, store.port))
        outcomes: dict[int, tuple[str, str]] = {}
        while waiting:
            ready = [each for each in wait(list(waiting), LONGEST_S) if isinstance(each, Connection)]
            for pipe in ready:
                outcomes[waiting.pop(pipe)] = _received(pipe)
            broken = [each for each in outcomes.values() if each[0] not in {"equal", "NOT EQUAL"}]
            if broken or not ready:  # the others may wait for this one
                self.stop()
                return broken[0] if broken else (f"did not finish in {LONGEST_S:.0f} s", "")
        return max((verdict for verdict, _ in outcomes.values()), key=len), outcomes[0][1]

    def _start(self, num_ranks: int) -> None:
        for rank in range(len(self._ranks), num_ranks):
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve_as, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))

    def stop(self) -> None:
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks.clear()


def _received(pipe: Connection) -> tuple[str, str]:
    try:
        verdict, output = pipe.recv()
    except (EOFError, ConnectionError):
        return "a rank died", ""
    return verdict, output


def _serve_as(rank: int, pipe: Connection) -> None:
    """One rank: what it is sent it runs."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "localhost",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    while True:
        (script, arguments, num_ranks), port = pipe.recv()
        os.environ |= {"WORLD_SIZE": str(num_ranks), "MASTER_PORT": str(port)}
        pipe.send(_run(script, arguments))


def _run(script: str, arguments: Sequence[str]) -> tuple[str, str]:
    for module in PROGRAM_MODULES:
        sys.modules.pop(module, None)
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
    ranks = _Ranks()
    try:
        while True:
            pipe.send(ranks.run(pipe.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        ranks.stop()


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
