"""A local program as the search knows it: what one rank runs, with its price."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from autopar.search.block_ilp import AxisSolution
from autopar.search.units import Chain

MOST_PROBLEMS = 56
"""The operator programs that are kept at a time, and beside these the layouts with floors in one, and the
programs whose experts are not dealt out yet: they take much room, and what is asked for again is so soon."""


class ProgramKey(NamedTuple):
    """What distinguishes programs. `levels` are the prices of memory of their blocks, where these are not all
    that of the program."""

    microbatch_size: int
    data_size: int
    cp: int
    ep: int
    tp: int
    sequence_parallel: bool | None
    num_microbatches: int
    price_level: int
    levels: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """A local program with its price.

    `strategies` maps the axes to the strategy key of every representative op; `solution` is None without a
    tensor axis.
    """

    key: ProgramKey
    chain: Chain
    solution: AxisSolution | None
    strategies: Mapping[str, Mapping[str, str]]
