"""`autopar evaluate --records`: how well predictions agree with measured training runs."""

from __future__ import annotations

import argparse
import sys

from autopar.cli.output import check_new, log, progress, short_warnings, write_new
from autopar.cli.parser import build_parser
from autopar.errors import AutoparError

NEEDED = {"model": "MODEL", "cluster": "CLUSTER", "global_batch": "--global-batch N"}
"""What a single evaluation cannot do without, and how it is written."""

OF_RECORDS = frozenset({"records", "tiers", "group", "worst", "output", "force", "format", "quiet", "run"})


def evaluate_records(options: argparse.Namespace) -> None:
    """Predict every record of the file and print the accuracy, or its JSON. Raises AutoparError."""
    from autopar.records.assess import assess
    from autopar.records.json import accuracy_json
    from autopar.records.table import accuracy_text

    _check_nothing_else(options)
    check_new(options.output, force=options.force)
    with short_warnings(quiet=options.quiet), progress(quiet=options.quiet) as on_progress:
        found = assess(options.records, options.tiers, options.group, on_progress)
    if options.output is not None:
        write_new(options.output, accuracy_json(found), force=options.force)
        log(f"saved {options.output}", quiet=options.quiet)
    as_json = options.format == "json"
    sys.stdout.write(accuracy_json(found) if as_json else accuracy_text(found, options.worst))


def check_one_plan(options: argparse.Namespace) -> None:
    """Raises AutoparError when what a single evaluation needs is missing."""
    missing = [written for name, written in NEEDED.items() if getattr(options, name) is None]
    if missing:
        raise AutoparError(
            f"evaluate needs {', '.join(missing)}; or name a file of measured runs with --records FILE"
        )


def _check_nothing_else(options: argparse.Namespace) -> None:
    """A model or a degree beside `--records` would be ignored, so it is refused."""
    defaults = vars(build_parser().parse_args(["evaluate"]))
    for name, default in defaults.items():
        if name not in OF_RECORDS and getattr(options, name) != default:
            written = NEEDED.get(name, f"--{name.replace('_', '-')}").partition(" ")[0]
            raise AutoparError(
                f"a file of --records tells models, clusters and degrees of its own; drop {written}"
            )
