"""torch.export of a model in training, without its memory and without touching it for good."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd import Function
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from graphs.errors import CaptureError, DataDependentError, UnsupportedOpError
from graphs.huggingface import prepared_for_export

_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)


def export_training(model: nn.Module, inputs: Mapping[str, Any]) -> ExportedProgram:
    """The training graph of `model(**inputs)` as torch exports it.

    Parameters and inputs are replaced by fake tensors on the cpu for the time of the export, buffers only where they
    have no values. The model is left as it was. Raises `CaptureError` and its kin.
    """
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.enter_context(_in_training(model))
        stack.enter_context(prepared_for_export(model, inputs))
        stack.enter_context(_without_memory(model, fake_mode))
        stack.enter_context(_custom_backwards_refused(model))
        fakes = {name: fake_like(value, fake_mode) for name, value in inputs.items()}
        try:
            return torch.export.export(model, (), fakes, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            raise _explained(error, model) from error


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
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    model.train()
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in checkpointed:
            module.gradient_checkpointing = True


@contextmanager
def _without_memory(model: nn.Module, fake_mode: FakeTensorMode) -> Iterator[None]:
    """Fake parameters in place of the model's own, ties kept; fake buffers where the model's have no values."""
    parameters = [(module, name, value) for module in model.modules() for name, value in module._parameters.items()]
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
        for module, name, value in buffers:
            module._buffers[name] = value


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory behind it, so neither meta nor fake."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


@contextmanager
def _custom_backwards_refused(model: nn.Module) -> Iterator[None]:
    """Refuse autograd functions of the user's own: export keeps their forward and drops their backward silently."""
    original = Function.__dict__["apply"]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            path, source = _where(_callers(sys._getframe(1)), model)
            raise UnsupportedOpError(
                f"forward calls the custom autograd function {cls.__qualname__}, whose backward cannot be captured",
                module=path,
                source=source,
                advice="use its plain torch form, or register it as a torch.library.custom_op with register_autograd",
            )
        return original.__get__(None, cls)(*args, **kwargs)

    Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]  # restored below
    try:
        yield
    finally:
        Function.apply = original  # type: ignore[method-assign]  # what it was


def _explained(error: Exception, model: nn.Module) -> CaptureError:
    """The error a user gets in place of torch's."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    path, source = _where([frame for item in chain for frame in _frames(item.__traceback__)], model)
    if any(isinstance(item, _DATA_DEPENDENT) for item in chain) or "data-dependent" in str(error).lower():
        operator = next((str(item.func) for item in chain if isinstance(item, _DATA_DEPENDENT[:2])), "a tensor's value")
        return DataDependentError(
            f"forward depends on the values of a tensor ({operator})",
            module=path,
            source=source,
            advice="replace the branch or the variable shape by torch.where, masking or a fixed size",
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


def _callers(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    """A running frame and those that called it, outermost first."""
    stack = []
    while frame is not None:
        stack.append((frame, frame.f_lineno))
        frame = frame.f_back
    yield from reversed(stack)


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
