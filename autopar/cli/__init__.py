"""The command `autopar`.

The artefact goes to stdout, everything else to stderr. Exit codes: 0 done, 1 it ran and the answer is no
(nothing fits, parity failed), 2 the request was wrong. torch is imported only by the commands that need it,
so help is instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from autopar.cli.parser import build_parser, check_command

__all__ = ["main"]

OK, NO, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        check_command(words)
        options = build_parser().parse_args(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        return _run(options.run, options)
    except BrokenPipeError:
        # The reader has left; without this the interpreter complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("autopar: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(command: str, options: object) -> int:
    from autopar.cli import commands
    from autopar.errors import InfeasibleError, SearchTimeoutError

    try:
        code: int = getattr(commands, command)(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        raise
    except (InfeasibleError, SearchTimeoutError) as no:
        print(f"autopar: {no}", file=sys.stderr)
        return NO
    except OSError as error:
        if error.filename is None:
            raise
        print(f"autopar: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return USAGE
    except ValueError as error:
        if not _is_users(error):
            raise
        print(f"autopar: error: {error}", file=sys.stderr)
        return USAGE


def _is_users(error: ValueError) -> bool:
    """Whether the user can mend it: one of our own errors. Others are bugs."""
    from autopar.errors import AutoparError
    from costmodel.errors import CostModelError
    from hardware_db.errors import HardwareError

    known: tuple[type[Exception], ...] = (AutoparError, HardwareError, CostModelError)
    if "graphs" in sys.modules:
        from graphs.errors import GraphError

        known = (*known, GraphError)
    return isinstance(error, known)
