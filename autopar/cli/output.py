"""Where the commands write: artefacts to stdout or a new file, the log and the progress bar to stderr."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from autopar.errors import AutoparError

ProgressCallback = Callable[[str, int, int], None]
"""Told the phase, what is done of it and how much there is; a total of 0 means that nobody knows."""


def write_new(path: Path, text: str, *, force: bool) -> None:
    """Write a file that must not exist yet, unless `force`. Raises AutoparError."""
    check_new(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def check_new(path: Path | None, *, force: bool) -> None:
    """Refuse an output that exists, before an hour of work and not after it. Raises AutoparError."""
    if path is not None and path.exists() and not force:
        raise AutoparError(f"{path} exists; choose another name or say --force")


def log(message: str, *, quiet: bool = False) -> None:
    if not quiet:
        print(f"autopar: {message}", file=sys.stderr, flush=True)


@contextmanager
def progress(*, quiet: bool) -> Iterator[ProgressCallback]:
    """A callback that draws a bar where stderr is a terminal, and logs each new phase where it is not."""
    if quiet:
        yield lambda phase, done, total: None
    elif sys.stderr.isatty():
        with _bar() as callback:
            yield callback
    else:
        seen: set[str] = set()

        def phases(phase: str, done: int, total: int) -> None:
            if phase not in seen:
                seen.add(phase)
                log(f"{phase} ...")

        yield phases


@contextmanager
def _bar() -> Iterator[ProgressCallback]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def update(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=None)
            bar.update(tasks[phase], completed=done, total=total or None)

        yield update


@contextmanager
def short_warnings(*, quiet: bool) -> Iterator[None]:
    """Our own warnings as one line each; those of the libraries underneath are not for the user to mend."""

    def show(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
        log(f"warning: {message}", quiet=quiet)

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns through a logger of its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in ("autopar", "graphs", "costmodel", "hardware_db"):
            warnings.filterwarnings("default", module=package)
        warnings.showwarning = show  # type: ignore[assignment]  # our signature takes what is passed
        yield
