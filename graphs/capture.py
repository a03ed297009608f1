"""Capture a model: from `nn.Module` and example inputs to an `OpGraph`.

    export      torch.export of the training graph, on fake tensors
    trace       functional ops in canonical form
    tidy        dead ops dropped, everything named
    measure     FLOPs and saved tensors
    find_blocks repeated blocks

Of long runs of layers that repeat only a few are exported, and the graph is expanded afterwards
(`graphs.repeats`). Nothing is computed and no memory is used, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from graphs.assemble import assemble
from graphs.batch import HIGH, LOW, Inputs, check_alike, inputs_of_any_batch, interpolate
from graphs.blocks import find_blocks
from graphs.errors import CaptureError
from graphs.export import export_training
from graphs.ir import OpGraph
from graphs.measure import measured
from graphs.repeats import expanded, find_runs, shortened
from graphs.routing import with_routing
from graphs.tidy import tidied
from graphs.uncollected import uncollected
from graphs.windows import with_windows


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        graph: the graph at batch size 2.
        other: the graph at batch size 3, without blocks, or the reason why there is none.
    """

    graph: OpGraph
    other: OpGraph | CaptureError

    def at(self, batch: int) -> OpGraph:
        """The graph at another batch size, op for op with the same names.

        Raises `CaptureError` where the model's operations depend on the batch size by more than their sizes.
        """
        if batch == LOW:
            return self.graph
        if isinstance(self.other, CaptureError):
            raise self.other
        return interpolate(self.graph, self.other, batch)


@uncollected()
def capture(
    model: nn.Module, example_inputs: Inputs | Callable[[int], Inputs], *, name: str | None = None
) -> Capture:
    """The operator graph of one training step's forward, `model(**inputs)`.

    Args:
        model: any module, on any device, meta included. It is left as it was.
        example_inputs: keyword arguments of forward by name, labels included, so that the model returns its
            loss; or a function from a batch size to them. Values of tensors do not matter, shapes and dtypes
            do.
        name: the graph's name, by default the class of the model.

    Raises `CaptureError`, or `DataDependentError` or `UnsupportedOpError`, which are kinds of it: each names
    the module and the line of forward.
    """
    inputs_at = inputs_of_any_batch(example_inputs)
    title = name or type(model).__name__
    found = _capture_shortened(model, inputs_at, title) or _capture_both(model, inputs_at, title)
    graph, other = _annotated(found.graph, model), found.other
    return Capture(
        replace(graph, blocks=find_blocks(graph)),
        _annotated(other, model) if isinstance(other, OpGraph) else other,
    )


def _annotated(graph: OpGraph, model: nn.Module) -> OpGraph:
    return with_routing(with_windows(graph, model))


def _capture_both(model: nn.Module, inputs_at: Callable[[int], Inputs], title: str) -> Capture:
    """The capture of the whole model, at both batch sizes where that can be done."""
    graph = _exported(model, inputs_at(LOW), title, with_lines=True)
    other: OpGraph | CaptureError
    try:
        other = _exported(model, inputs_at(HIGH), title, with_lines=True)
        check_alike(graph, other)
    except CaptureError as error:
        other = error
    return Capture(graph, other)


def _exported(model: nn.Module, inputs: Inputs, name: str, *, with_lines: bool) -> OpGraph:
    program = export_training(model, inputs, with_lines=with_lines)
    return measured(tidied(assemble(model, program, name)))


def _capture_shortened(model: nn.Module, inputs_at: Callable[[int], Inputs], name: str) -> Capture | None:
    """The capture from a few instances of what repeats, None where nothing repeats or not reliably.

    The two batch sizes keep a different number of instances, so whatever depends on how many there are shows
    up as a difference between the two graphs. Three show that the third does what the second does; two must
    then lead to the same graph. Where ops stand between instances, the last of two is not like a second that
    others follow: then the second capture keeps four.
    """
    runs = find_runs(model)
    if not runs:
        return None

    def from_few(batch: int, kept: int) -> OpGraph | None:
        try:
            with shortened(model, runs, kept):
                graph = _exported(model, inputs_at(batch), name, with_lines=False)
        except CaptureError:  # the capture of the whole model says it, and where
            return None
        return expanded(graph, model, runs, kept)

    low = from_few(LOW, 3)
    if low is None:
        return None
    high = from_few(HIGH, 2) or from_few(HIGH, 4)
    if high is None:
        return None
    try:
        check_alike(low, high)
    except CaptureError:
        return None
    return Capture(low, high)
