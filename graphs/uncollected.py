"""Python's garbage collector, paused while we make much that stays.

Importing torch's compiler or `transformers`, and capturing a model, allocate a million objects that live on.
The collector looks at all of them again and again and finds nothing: it takes a third of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No cyclic garbage collection inside, unless the caller had switched it off anyway."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
