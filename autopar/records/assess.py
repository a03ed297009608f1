"""From a file of measured training runs to the accuracy of our predictions for them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from autopar.errors import AutoparError
from autopar.records.metrics import Accuracy, accuracy
from autopar.records.schema import Record, read_records

__all__ = ["DEFAULT_TIERS", "assess", "select"]

DEFAULT_TIERS = ("A", "B")
OUT_OF_MEMORY = "oom"


def assess(
    path: Path,
    tiers: Sequence[str] = DEFAULT_TIERS,
    groups: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
    left_out_errors: Mapping[str, float] = MappingProxyType({}),
) -> Accuracy:
    """Predict the chosen records of a file and compare them with what was measured.

    `left_out_errors` has the mean |error| of groups under constants fitted without them, where known.

    Raises AutoparError when the file is malformed or when no record is in these tiers and groups.
    """
    records = select(read_records(path), tiers, groups)
    from autopar.records.predict import predict  # imports torch, which a bad file need not wait for

    return accuracy(records, predict(records, progress=progress), left_out_errors)


def select(
    records: Sequence[Record], tiers: Sequence[str] = DEFAULT_TIERS, groups: Sequence[str] = ()
) -> tuple[Record, ...]:
    """The records of these tiers and groups (of all groups when none is named).

    Tier A is complete, B leaves a setting open, C is ambiguous. Published lacks of memory come along always.
    Raises AutoparError, with the names that there are, when a group is unknown or when nothing is left.
    """
    _check_groups(groups, sorted({record.group for record in records}))
    here = [record for record in records if not groups or record.group in groups]
    chosen = tuple(record for record in here if record.tier in (*tiers, OUT_OF_MEMORY))
    if not chosen:
        tiers_here = ", ".join(sorted({record.tier for record in here})) or "no records"
        raise AutoparError(
            f"no record in tiers {', '.join(tiers)} of {', '.join(groups) or 'the file'}, "
            f"which has {tiers_here}; name others with --tiers"
        )
    return chosen


def _check_groups(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise AutoparError(f"unknown group {name!r}{hint} (the file has {', '.join(known)})")
