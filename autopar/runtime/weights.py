"""Parameters from the original model's weights, in memory or on disk."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict_loader as checkpoint_loader
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.device_mesh import DeviceMesh

from autopar.runtime.held import Held
from autopar.runtime.layout import Layout, Placements, check_shape, fill
from autopar.runtime.tensors import local_part


def allocate(model: nn.Module, device: torch.device) -> None:
    """Memory on `device` for the parameters of a model that was built on the meta device.

    Tied parameters stay tied; buffers, which are never built on meta, keep their values.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                fresh = torch.empty_like(parameter, device=device)
                made[parameter] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


Weights = Mapping[str, Any] | Path
"""The original model's `state_dict`, or where it is on disk: a file of `torch.save`, safetensors or a
directory of them, or a checkpoint of `torch.distributed.checkpoint`."""


def load(
    model: nn.Module,
    weights: Weights,
    mesh: DeviceMesh,
    placements: Placements,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Fill the parameters and buffers of a rank's model with its part of the original model's weights; of
    what is on disk it reads no more.

    `aliases` are the further names of tied parameters, each with the first: one of them must be there.
    Raises ValueError where the weights are of another model.
    """
    tensors = model.state_dict(keep_vars=True)
    saved: Mapping[str, Any] = opened(weights) if isinstance(weights, Path) else weights
    found = saved_names(tensors, saved, aliases)
    if isinstance(weights, Path) and (weights / ".metadata").is_file():
        held = {
            found[name]: (Layout.of(name, each, mesh, placements), each) for name, each in tensors.items()
        }
        state = {name: Held(layout, local_part(each.detach())) for name, (layout, each) in held.items()}
        for name, each in state.items():
            check_shape(name, saved[name].size, each.rectangles)
        read_checkpoint(state, weights)
    else:
        for name, tensor in tensors.items():
            fill(name, tensor, saved[found[name]], mesh, placements)


def read_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Fill what this rank holds from a checkpoint. Ranks need not agree, as each reads for itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is not, nor needed here
        checkpoint_loader.load(state, checkpoint_id=path, no_dist=True)


def opened(path: Path) -> Mapping[str, Any]:
    """Names in a file or directory of weights, with what can be sliced; of a checkpoint, with what it says
    of each tensor."""
    if (path / ".metadata").is_file():
        saved: Mapping[str, Any] = FileSystemReader(path).read_metadata().state_dict_metadata
        return saved
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds neither safetensors nor a checkpoint of torch.distributed.checkpoint")
    if files[0].suffix != ".safetensors":
        tensors: Mapping[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return tensors
    from safetensors import safe_open  # only those who have such files need the package

    readers: list[Any] = [safe_open(file, framework="pt") for file in files]
    # An open file is no mapping: it has keys, but cannot be iterated.
    # A safetensors file is no mapping: it has keys, but cannot be iterated over.
    return {name: file.get_slice(name) for file in readers for name in file.keys()}  # noqa: SIM118


def saved_names(
    names: Collection[str], saved: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, str]:
    """For every name the one under which it is saved: by itself, or as part of what `train.py` saves."""
    is_of_training = any(key.startswith("optimizer.state.") for key in saved)
    attempts = [
        {
            name: prefix + each
            for name in names
            for each in all_names(name, aliases)[::-1]
            if prefix + each in saved
        }
        for prefix in (("model.",) if is_of_training else ("", "model."))
    ]
    found = max(attempts, key=len)
    missing = next((name for name in names if name not in found), None)
    if missing is None:
        return found
    near = difflib.get_close_matches(missing, saved, n=1)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise ValueError(
        f"the weights have no {missing!r}{hint}. Pass the state_dict() of the model that was planned"
    )


def all_names(name: str, aliases: Mapping[str, str]) -> list[str]:
    """All names of a parameter, this one first."""
    first = aliases.get(name, name)
    return list(dict.fromkeys((name, first, *(each for each, of in aliases.items() if of == first))))
