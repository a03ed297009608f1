"""Files that start an emitted program on a cluster: a plan becomes a `JobSpec`, and a launcher renders it.

Rendering is pure, so what would be submitted can be read, tested and edited before anything runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from autopar.errors import AutoparError
from autopar.launch import slurm, torchrun
from autopar.launch.spec import JobSpec, job_of
from autopar.plan import Plan

__all__ = ["TARGETS", "JobSpec", "Launch", "job_of", "launch"]

TARGETS: Mapping[str, Callable[[JobSpec], dict[str, str]]] = MappingProxyType(
    {"torchrun": torchrun.render, "slurm": slurm.render}
)
"""Launcher by name: what it makes of a job, as text by file name."""


@dataclass(frozen=True)
class Launch:
    """The files of one launcher, by name, and the job they start."""

    target: str
    job: JobSpec
    files: Mapping[str, str] = field(hash=False)

    def save(self, directory: str | Path, *, force: bool = False) -> tuple[Path, ...]:
        """Write the files into `directory`, executable; returns their paths.

        Raises AutoparError when one of them is there already with another content, unless `force`.
        """
        folder = Path(directory)
        paths = {folder / name: text for name, text in self.files.items()}
        for path, text in paths.items():
            if not force and path.exists() and path.read_text(encoding="utf-8") != text:
                raise AutoparError(f"{path} exists and differs; remove it, or force overwriting")
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in paths.items():
            path.write_text(text, encoding="utf-8")
            path.chmod(0o755)
        return tuple(paths)


def launch(plan: Plan, target: str = "torchrun", **overrides: Any) -> Launch:
    """The files that start the program of `plan`: `target` is "torchrun" or "slurm".

    `overrides` replace fields of the `JobSpec`, such as `time_limit_s=3600`, `script="train.py"` or
    `scheduler_options=("--partition=train",)`. Raises AutoparError for an unknown target or field, and
    InvalidParallelismError when the ranks do not fill whole nodes.
    """
    if target not in TARGETS:
        close = difflib.get_close_matches(target, TARGETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise AutoparError(f"unknown launch target {target!r}{hint} (there are {', '.join(TARGETS)})")
    job = job_of(plan, **overrides)
    return Launch(target, job, MappingProxyType(TARGETS[target](job)))
