"""What the modules that a class stands for were in the original model: told in its docstring and its name.

An origin is the path of a module, or the number of a stage, and the name of its class in a second line.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable


def distinction(origin: str, others: Iterable[str]) -> str:
    """The innermost module around a place, or at it, that is around none of the others, in camel case; none
    that has but another number."""
    path, *paths = (each.partition("\n")[0].split(".") for each in (origin, *others))
    known = {part for each in paths for part in each}
    named = (part for part in reversed(path) if part.isidentifier() and not part[-1].isdigit())
    found = next((part for part in named if part not in known), "")
    return "".join(word[:1].upper() + word[1:] for word in found.split("_"))


def docstring(origins: Iterable[str]) -> list[str]:
    """Lines that say what a class was in the original model, and where."""
    places, kinds = zip(*(origin.split("\n") for origin in origins), strict=True)
    starred = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", place) for place in places))
    if not places[0]:
        text = f"The `{kinds[0]}` that one rank runs."
    elif places[0].isdigit():
        stages = ", ".join(str(int(place) + 1) for place in places)
        text = f"Stage{'s' if len(places) > 1 else ''} {stages} of the `{kinds[0]}`."
    elif len(places) == 1:
        text = f"`{places[0]}`, a `{kinds[0]}`."
    else:
        others = f" and {len(starred) - 1} other places" if len(starred) > 2 else ""
        where = others or (f" and `{starred[1]}`" if len(starred) == 2 else "")
        text = f"`{starred[0]}`{where}, {len(places)} times a `{kinds[0]}`."
    return textwrap.wrap(f'"""{text}"""', 106, break_long_words=False, break_on_hyphens=False)
