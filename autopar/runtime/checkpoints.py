"""Checkpoints: written under one plan, read under any."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_saver as checkpoint_saver
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.runtime.held import Held
from autopar.runtime.layout import Layout, Placements, check_shape
from autopar.runtime.optimizers import Optimizer, updated
from autopar.runtime.tensors import local_part
from autopar.runtime.weights import all_names, opened, read_checkpoint, saved_names


@dataclass(frozen=True)
class Trained:
    """What a rank trains, and how it is cut out of the original model: what a checkpoint is made of."""

    stages: Sequence[nn.Module]
    optimizer: Optimizer
    mesh: DeviceMesh
    placements: Placements
    aliases: Mapping[str, str] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """This rank's part by the names of the original model: under `model.` its `state_dict`, in master
        copies where there are some, and under `optimizer.state.` the states of each parameter."""
        state: dict[str, Any] = {}
        for stage in self.stages:
            held = stage.state_dict(keep_vars=True)
            newest = updated(held, self.optimizer)
            for name, tensor in held.items():
                layout = Layout.of(name, tensor, self.mesh, self.placements)
                for each in all_names(name, self.aliases):
                    state[f"model.{each}"] = Held(layout, local_part(newest[name].detach()))
                first = self.aliases.get(name, name)
                for key, value in self.optimizer.state.get(newest[name], {}).items():
                    whole = value.dim() == 0 and tensor.dim() > 0
                    state[f"optimizer.state.{first}.{key}"] = (
                        value if whole else Held(layout, local_part(value))
                    )
        return state

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Take this rank's part of a checkpoint of the same model, whatever plan wrote it; call it before the
        first step.

        Raises ValueError where the checkpoint is of another model.
        """
        saved = opened(path)
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        for stage in self.stages:
            held = stage.state_dict(keep_vars=True)
            for name, tensor in updated(held, self.optimizer).items():
                if f"optimizer.state.{self.aliases.get(name, name)}.exp_avg" in saved:
                    moments = {key: torch.zeros_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
                    # Fused updates count steps where the parameters are, all others on the host.
                    step = torch.zeros((), device=local_part(tensor).device if fused else "cpu")
                    self.optimizer.state[tensor].update(step=step, **moments)
        state = self.state()
        saved_names([name.removeprefix("model.") for name in state if name.startswith("model.")], saved, {})
        for name, each in state.items():
            if isinstance(each, Held):
                check_shape(name, saved[name].size, each.rectangles)
        read_checkpoint(state, path)
        for parameter, master in getattr(self.optimizer, "masters", {}).items():
            local_part(parameter).copy_(master)


class Checkpoints:
    """The checkpoints of a run, `step-N` in a directory that all ranks see (None: there are none). They are
    written while training goes on; the newest `num_kept` stay."""

    def __init__(self, directory: Path | None, num_kept: int = 2) -> None:
        self.directory, self.num_kept = directory, num_kept
        self.group = dist.new_group(backend="gloo")
        self.writer = ThreadPoolExecutor(1)
        self.written: Future[None] | None = None

    def complete(self) -> list[tuple[int, Path]]:
        """Steps and paths of the checkpoints that were written to the end, the newest last."""
        found = [path.parent for path in self.directory.glob("step-*/.metadata")] if self.directory else []
        return sorted((int(path.name.removeprefix("step-")), path) for path in found)

    def resume(self, trained: Trained) -> dict[str, Any]:
        """Take what the newest checkpoint holds; returns what `save` was given beside it, `{}` where there is
        none."""
        complete = self.complete()
        if not complete:
            return {}
        path = complete[-1][1]
        trained.restore(path)
        noted: dict[str, Any] = json.loads((path / "progress.json").read_text())
        return noted

    def save(self, step: int, trained: Trained, **progress: Any) -> None:
        """Begin to write a checkpoint: copies what is to be written, and waits for the one before."""
        self.wait()
        if self.directory is not None:
            state = {name: _staged(value) for name, value in trained.state().items()}
            path = self.directory / f"step-{step}"
            self.written = self.writer.submit(self._write, path, state, {"step": step, **progress})

    def wait(self) -> None:
        """Until what was begun is written."""
        if self.written is not None:
            self.written.result()

    def _write(self, path: Path, state: Mapping[str, Any], progress: Mapping[str, Any]) -> None:
        if dist.get_rank() == 0:
            path.mkdir(parents=True, exist_ok=True)
            (path / "progress.json").write_text(json.dumps(progress))
        checkpoint_saver.save(dict(state), checkpoint_id=path, process_group=self.group)
        if dist.get_rank() == 0:
            for _, old in self.complete()[: -self.num_kept]:
                shutil.rmtree(old)


def _staged(value: Tensor) -> Tensor:
    """A copy in the host's memory, which training does not change."""
    if isinstance(value, Held):
        return Held(value.rectangles, value.local.to("cpu", copy=True))
    return value.to("cpu", copy=True)
