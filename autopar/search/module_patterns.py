"""Patterns of module paths, as people write them in pins.

    model.layers.3.mlp        a path
    model.layers.*.mlp        `*` stands for anything but a dot
    **.mlp                    `**` stands for dots, too
    model.layers.[0-3,12]     numbers and ranges of numbers, both ends included

A pattern covers the paths that it matches and all that lies inside them, as a module holds its submodules and
their parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from autopar.errors import PinConflictError
from hardware_db.errors import did_you_mean

_TOKEN = re.compile(r"(\*\*|\*|\[[^\]]*\])")
_NUMBERS = re.compile(r"(\d+)(?:-(\d+))?")
FEW = 5
"""How many names an error lists where none is close."""


def covers(pattern: str, path: str) -> bool:
    """Whether the pattern matches `path` or a module that holds it."""
    return _compiled(pattern).fullmatch(path) is not None


def covering(pattern: str, path: str) -> str | None:
    """The module, `path` itself or one that holds it, that the pattern matches; None where it covers
    nothing of it."""
    found = _compiled(pattern).fullmatch(path)
    return None if found is None else found[1]


def nearest(pattern: str, paths: Iterable[str]) -> str:
    """The tail of a sentence that says which of `paths` the pattern may have meant."""
    known = [path for path in dict.fromkeys(paths) if path]
    if _TOKEN.search(pattern):
        known = [*dict.fromkeys(generalized(path) for path in known)]
        pattern = _TOKEN.sub("*", pattern)
    meant = did_you_mean(pattern, known)
    if meant or not known:
        return meant
    return f"; there are {', '.join(known[:FEW])}{', ...' if len(known) > FEW else ''}"


def generalized(path: str) -> str:
    """The path with `*` for every number in it: `model.layers.*.mlp`."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def check_pattern(pattern: str) -> None:
    """Raises PinConflictError for what is no pattern."""
    _compiled(pattern)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    if not pattern:
        raise PinConflictError("an empty module path names nothing; '**' stands for all modules")
    body = "".join(_expression(token, pattern) for token in _TOKEN.split(pattern))
    return re.compile(rf"({body})(?:\..*)?")


def _expression(token: str, pattern: str) -> str:
    if token == "**":
        return ".*"
    if token == "*":
        return r"[^.]*"
    if token.startswith("[") and token.endswith("]"):
        return f"(?:{'|'.join(map(str, _numbers(token[1:-1], pattern)))})"
    return re.escape(token)


def _numbers(text: str, pattern: str) -> Iterator[int]:
    for part in text.split(","):
        found = _NUMBERS.fullmatch(part.strip())
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            raise PinConflictError(
                f"{pattern}: [{text}] is no list of numbers; write [0-3] for 0 to 3, or [0-3,12]"
            )
        yield from range(int(found[1]), int(found[2] or found[1]) + 1)
