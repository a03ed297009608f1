"""What was made of objects, kept of those that were asked for last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


class Recent(Generic[_Given, _Made]):
    """What `make` makes of objects that are told apart by identity, each time the same unless so many others
    were asked for since: `most` are kept."""

    def __init__(self, make: Callable[[_Given], _Made], most: int) -> None:
        self._make = make
        self._most = most
        # With what it was made of: while that lives, nothing else has its identity.
        self._known: dict[int, tuple[_Given, _Made]] = {}

    def of(self, given: _Given) -> _Made:
        """What is made of this object."""
        found = self._known.pop(id(given), None) or (given, self._make(given))
        if len(self._known) == self._most:
            del self._known[next(iter(self._known))]
        self._known[id(given)] = found  # behind all others: what was asked for longest ago goes first
        return found[1]
