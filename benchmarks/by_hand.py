"""A Llama made parallel by hand: `parallelize_module`, `fully_shard` and DDP, as their documentation says.

What emitted programs are held against (`benchmarks/emitted.py`). The forms have the degrees of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

FORMS: Mapping[str, Mapping[str, object]] = {
    "dp2": {"dp_replicate": 2},
    "fsdp2": {"dp_shard": 2, "zero_stage": 3},
    "tp2": {"tp": 2, "sequence_parallel": False},
    "sp2": {"tp": 2, "sequence_parallel": True},
    "fsdp2 tp2": {"dp_shard": 2, "zero_stage": 3, "tp": 2, "sequence_parallel": True},
    "dp4": {"dp_replicate": 4},
    "fsdp4": {"dp_shard": 4, "zero_stage": 3},
}
"""Degrees by name."""

Forward = Callable[[Mapping[str, Tensor]], Tensor]
"""From a batch to its mean loss, the backward of which may run in the same context."""


def parallelized(model: nn.Module, form: Mapping[str, object]) -> tuple[nn.Module, Forward]:
    """The model on this rank, and its loss on this rank's part of a batch."""
    degrees = {axis: form[axis] for axis in ("dp_replicate", "dp_shard", "tp") if axis in form}
    # A form has values of several types; those of axes are sizes.
    mesh = init_device_mesh("cpu", tuple(degrees.values()), mesh_dim_names=tuple(degrees))  # type: ignore[arg-type]
    if "tp" in form:
        _split(model, mesh["tp"], sequence=bool(form["sequence_parallel"]))
    if "dp_shard" in form:
        for layer in model.get_submodule("model.layers").children():
            fully_shard(layer, mesh=mesh["dp_shard"])
        fully_shard(model, mesh=mesh["dp_shard"])
    if "dp_replicate" in form:
        model = DistributedDataParallel(model, process_group=mesh.get_group("dp_replicate"))

    def forward(batch: Mapping[str, Tensor]) -> Tensor:
        labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        logits = model(input_ids=batch["input_ids"]).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    return model, forward


def _split(model: nn.Module, tp: DeviceMesh, *, sequence: bool) -> None:
    """Columns and rows over `tp`; with `sequence` what lies between is split along the sequence."""
    between = Shard(1) if sequence else Replicate()
    block: dict[str, ParallelStyle] = {
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(output_layouts=between),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=between),
    }
    root: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "lm_head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        split: dict[str, Placement] = {"hidden_states": Shard(1)}
        gathered: dict[str, Placement] = {"hidden_states": Replicate()}
        block |= {
            "input_layernorm": SequenceParallel(),
            "post_attention_layernorm": SequenceParallel(),
            "self_attn": PrepareModuleInput(input_kwarg_layouts=split, desired_input_kwarg_layouts=gathered),
            "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        }
        root |= {
            "model.layers.0": PrepareModuleInput(
                input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
            ),
            "model.norm": SequenceParallel(),
        }
    for layer in model.get_submodule("model.layers").children():
        parallelize_module(layer, tp, block)
    parallelize_module(model, tp, root)
