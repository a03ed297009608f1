"""torch.export of a model in training, without its memory and without touching it for good."""

from __future__ import annotations

import io
import linecache
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from types import FrameType, TracebackType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.export import ExportedProgram
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from graphs.custom_functions import custom_functions_in_the_open, disagreement
from graphs.errors import DATA_DEPENDENT_ADVICE, CaptureError, DataDependentError, UnsupportedOpError
from graphs.huggingface import prepared_for_export
from graphs.leaves import has_values

_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
_CHECKPOINTING = "gradient_checkpointing"  # how models of `transformers` switch it
_TALKATIVE = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


def export_training(
    model: nn.Module, inputs: Mapping[str, Any], *, with_lines: bool = True
) -> ExportedProgram:
    """The training graph of `model(**inputs)` as torch exports it.

    Parameters and inputs are replaced by fake tensors on the cpu for the time of the export, buffers only
    where they have no values. The model is left as it was. `with_lines` notes at every node the lines of
    forward that led to it, which takes a while. Raises `CaptureError` and its kin.
    """
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.enter_context(_in_training(model))
        stack.enter_context(prepared_for_export(model, inputs))
        stack.enter_context(_without_memory(model, fake_mode))
        functions = stack.enter_context(custom_functions_in_the_open())
        # torch writes and compiles Python source for every intermediate graph; nobody calls it.
        stack.enter_context(_use_lazy_graph_module(True))
        stack.enter_context(patch.object(torch.fx.config, "do_not_emit_stack_traces", not with_lines))
        fakes = {name: fake_like(value, fake_mode) for name, value in inputs.items()}
        try:
            with _quiet():
                program = torch.export.export(model, (), fakes, strict=False)
        except Exception as error:  # forward may raise anything; `_explained` says what, where and what to do
            raise _explained(error, model) from error
    for function in functions:
        if (problem := disagreement(function)) is not None:
            path, source = _where(function.frames, model)
            raise UnsupportedOpError(
                f"forward calls the custom autograd function {function.cls.__qualname__}: {problem}",
                module=path,
                source=source,
                advice="write it in plain torch, or as a torch.library.custom_op with register_autograd",
            )
    return program


def fake_like(value: Any, fake_mode: FakeTensorMode) -> Any:
    """A fake tensor on the cpu that looks like `value`; anything but a tensor is returned as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    with fake_mode:
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    return fake.requires_grad_(value.requires_grad) if value.is_floating_point() else fake


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Training mode, with activation checkpointing off: what to recompute is decided later."""
    modes = [(module, module.training) for module in model.modules()]
    checkpointed = [module for module in model.modules() if getattr(module, _CHECKPOINTING, False) is True]
    model.train()
    for module in checkpointed:
        setattr(module, _CHECKPOINTING, False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in checkpointed:
            setattr(module, _CHECKPOINTING, True)


@contextmanager
def _without_memory(model: nn.Module, fake_mode: FakeTensorMode) -> Iterator[None]:
    """Fake parameters in place of the model's, ties kept; fake buffers where the model's have no values."""
    parameters = [
        (module, name, value) for module in model.modules() for name, value in module._parameters.items()
    ]
    buffers = [(module, name, value) for module in model.modules() for name, value in module._buffers.items()]
    fakes: dict[int, nn.Parameter] = {}
    try:
        for module, name, parameter in parameters:
            if parameter is not None:
                if id(parameter) not in fakes:
                    fake = fake_like(parameter.detach(), fake_mode)
                    fakes[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = fakes[id(parameter)]
        for module, name, buffer in buffers:
            if buffer is not None and not has_values(buffer):
                module._buffers[name] = fake_like(buffer, fake_mode)
        yield
    finally:
        for module, name, value in parameters:
            module._parameters[name] = value
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what torch prints and logs about an export that fails; our error says it better."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    before = [logger.disabled for logger in loggers]
    printed = io.StringIO()
    for logger in loggers:
        logger.disabled = True
    try:
        with redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _explained(error: Exception, model: nn.Module) -> CaptureError:
    """The error a user gets in place of torch's."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    path, source = _where([frame for item in chain for frame in _frames(item.__traceback__)], model)
    if any(isinstance(item, _DATA_DEPENDENT) for item in chain) or "data-dependent" in str(error).lower():
        operator = next(
            (str(item.func) for item in chain if isinstance(item, _DATA_DEPENDENT[:2])),
            "a condition, a number or a size read from it",
        )
        return DataDependentError(
            f"forward depends on the values of a tensor ({operator})",
            module=path,
            source=source,
            advice=DATA_DEPENDENT_ADVICE,
        )
    first_line = next(iter(str(error).strip().splitlines()), "")
    return CaptureError(
        f"torch.export failed with {type(error).__name__}: {first_line}",
        module=path,
        source=source,
        advice="run model(**inputs) once on small real tensors to see whether the model itself runs",
    )


def _frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    """Frames of a traceback, outermost first, each with the line it was at."""
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _where(frames: Iterable[tuple[FrameType, int]], model: nn.Module) -> tuple[str | None, str | None]:
    """Path of the innermost module whose code is running, and the innermost line that is not torch's own."""
    paths = {id(module): path for path, module in model.named_modules()}
    path = source = None
    for frame, line in frames:
        filename = frame.f_code.co_filename
        path = paths.get(id(frame.f_locals.get("self")), path)
        if path is not None and "/torch/" not in filename and "<" not in filename:
            source = f"{filename}:{line}: {linecache.getline(filename, line).strip()}"
    return path, source
