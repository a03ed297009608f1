"""Blocks that pins tell apart: where a placement is pinned for some of many equal blocks, these are of a form
of their own.

The search gives all blocks of one kind the same strategies, and a form makes a kind (`graphs.ir.Block`). So
what is pinned for one block leaves the others free, and costs the search what a further kind of block does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from autopar.search.module_patterns import covers
from autopar.search.pin_placement import PINNED_AXES
from autopar.search.pin_rules import placements_of
from autopar.search.pins import Pins
from graphs import Capture
from graphs.ir import Block, OpGraph


def told_apart(capture: Capture, pins: Pins) -> Capture:
    """The capture with a form for blocks of which the pins ask the same; itself where these are its forms."""
    blocks = _with_forms(capture.graph, pins)
    if blocks == capture.graph.blocks:
        return capture
    return replace(capture, graph=replace(capture.graph, blocks=blocks))


def _with_forms(graph: OpGraph, pins: Pins) -> tuple[Block, ...]:
    names = [name for p in graph.parameters for name in (p.name, *p.aliases)]
    placements = [pin for axis in PINNED_AXES for pin in placements_of(pins, axis)]
    covered = [
        ((pin.axis, pin.text), [name for name in (*names, *graph.modules) if pin.covers(name)])
        for pin in placements
    ]
    forms: dict[int, dict[object, int]] = {}
    blocks = []
    for block in graph.blocks:
        of_class = forms.setdefault(block.block_class, {})
        asked = frozenset((*what, name) for what, names in covered for name in _inside(block.path, names))
        blocks.append(replace(block, form=of_class.setdefault(asked, len(of_class))))
    return tuple(blocks)


def _inside(path: str, names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.removeprefix(path) for name in names if covers(path, name))
