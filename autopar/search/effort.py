"""What each layer of a search has to solve: how many problems, how large they get, and how long they take.

The clock runs for one layer at a time, the innermost at work, so the seconds of all layers add up to those of
the search. Counts and sizes are the same for the same input; seconds are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, Literal, ParamSpec, Protocol, TypeVar, get_args

from autopar.plan import LayerEffort
from autopar.search.linear_model import Size

Layer = Literal["operators", "operator floors", "local programs", "stages", "recomputation", "candidates"]
"""From the innermost to the outermost:

- operators: integer programs of `block_ilp`, for each axis, degree, microbatch size and price of memory; most
  of their time goes into prices and rows, not into solving
- operator floors: their relaxations for single blocks (`block_floor`, `unit_floor`)
- local programs: what one rank runs, made and priced (`programs`); nothing is solved
- stages: dynamic programs over cuts (`stages`), the arcs of their paths as variables and their states as rows
- recomputation: the knapsacks of `variants`
- candidates: the search over layouts and ways (`branch`): one of all candidates is chosen
"""


class Effort:
    """The effort of one search, noted as it goes on; the clock starts at once."""

    def __init__(self) -> None:
        self._num_problems: dict[Layer, int] = dict.fromkeys(get_args(Layer), 0)
        self._largest: dict[Layer, Size] = {}
        self._cpu_s: dict[Layer, float] = dict.fromkeys(get_args(Layer), 0.0)
        self._at_work: list[Layer] = ["candidates"]
        self._since_s = time.process_time()

    @contextmanager
    def on(self, layer: Layer) -> Iterator[None]:
        """The time inside is the layer's, but for what other layers take of it."""
        self._charge()
        self._at_work.append(layer)
        try:
            yield
        finally:
            self._charge()
            self._at_work.pop()

    def _charge(self) -> None:
        now_s = time.process_time()
        self._cpu_s[self._at_work[-1]] += now_s - self._since_s
        self._since_s = now_s

    def solved(self, layer: Layer, size: Size | None = None) -> None:
        """Note one more problem of a layer, of that size if it has any."""
        self._num_problems[layer] += 1
        if size is not None:
            self._largest[layer] = max(size, self._largest.get(layer, size), key=_by_variables)

    def num_problems(self, *layers: Layer) -> int:
        """The problems of these layers so far."""
        return sum(self._num_problems[layer] for layer in layers)

    def layers(self) -> tuple[LayerEffort, ...]:
        """So far, of every layer."""
        self._charge()
        return tuple(
            LayerEffort(
                layer=layer,
                num_problems=number,
                num_variables=largest.variables,
                num_rows=largest.rows,
                num_integer=largest.integer,
                cpu_s=self._cpu_s[layer],
            )
            for layer, number in self._num_problems.items()
            for largest in [self._largest.get(layer, Size(0, 0, 0))]
        )


def cut_size(num_units: int, num_stages: int) -> Size:
    """The size of cutting a chain, as a path: an arc for each stage and run of units, a state for its end."""
    num_runs = num_units * (num_units + 1) // 2
    return Size(num_stages * num_runs, num_stages * num_units, 0)


def _by_variables(size: Size) -> tuple[int, int]:
    return size.variables, size.rows


class _HasEffort(Protocol):
    effort: Effort


_Self = TypeVar("_Self", bound=_HasEffort)
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def clocked(
    layer: Layer,
) -> Callable[
    [Callable[Concatenate[_Self, _Parameters], _Result]], Callable[Concatenate[_Self, _Parameters], _Result]
]:
    """A decorator: the time of a method is a layer's, of the `effort` of its object."""

    def decorate(
        method: Callable[Concatenate[_Self, _Parameters], _Result],
    ) -> Callable[Concatenate[_Self, _Parameters], _Result]:
        @wraps(method)
        def timed(self: _Self, /, *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
            with self.effort.on(layer):
                return method(self, *args, **kwargs)

        return timed

    return decorate
