"""Errors a user of the hardware database can meet.

HardwareError(ValueError)
├── UnknownHardwareError    no such accelerator, node or cluster; names the closest ids
├── MissingFactError        the number exists in the schema but nobody has published it
└── ClusterFileError        a cluster file that does not say what it should
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ClusterFileError", "HardwareError", "MissingFactError", "UnknownHardwareError"]


class HardwareError(ValueError):
    """Base of all errors of the hardware database."""


class UnknownHardwareError(HardwareError):
    """No accelerator, node or cluster has this id."""


class MissingFactError(HardwareError):
    """A number that a computation needs is not known for this hardware."""


class ClusterFileError(HardwareError):
    """A cluster file is malformed; the message names file, field, what was found and what was expected."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The closest known words as the tail of a sentence, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
