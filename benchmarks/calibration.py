"""How well a profile of this machine predicts real training steps on it.

python benchmarks/calibration.py [--device cpu|cuda] [--profile PROFILE.json] [--seconds N]

Measures the device (or reads a profile of it), then trains a stack like GPT-2 and one like Llama on it,
eagerly, with several batch sizes, with and without recomputation, and prints step time and, on CUDA, the peak
of allocated memory beside what `autopar.evaluate` predicts for one such device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, cast

import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedModel

import hardware_db
from autopar import api
from autopar.calibrate import calibrate
from autopar.calibrate.machine import device_of
from autopar.calibrate.timing import time_call
from autopar.models import ModelSpec, from_hugging_face_config
from autopar.plan import Plan
from autopar.report import units
from autopar.report.table import table
from hardware_db import Cluster, Level, Profile
from hardware_db.calibration import accelerator_of

Recompute = Literal["none", "full"]


def gpt2(dtype: torch.dtype, seq_len: int, layers: int, width: int, heads: int, vocab: int) -> ModelSpec:
    """A stack of GPT-2 blocks without dropout."""
    config = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, n_positions=seq_len, vocab_size=vocab,
        embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return from_hugging_face_config(config, "gpt2-like", seq_len=seq_len, dtype=dtype)


def llama(dtype: torch.dtype, seq_len: int, layers: int, width: int, heads: int, vocab: int) -> ModelSpec:
    """A stack of Llama blocks with grouped queries."""
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
        num_key_value_heads=heads // 4, intermediate_size=7 * width // 2, vocab_size=vocab,
        max_position_embeddings=seq_len, use_cache=False,
    )  # fmt: skip
    return from_hugging_face_config(config, "llama-like", seq_len=seq_len, dtype=dtype)


def cases(device: torch.device) -> Iterator[tuple[ModelSpec, int, Recompute]]:
    """Model, samples of a step and recomputation: GPT-2 XL and Llama-3-8B blocks on a GPU, toys on a CPU."""
    models: tuple[tuple[ModelSpec, tuple[int, ...]], ...]
    if device.type == "cuda":
        bf16 = torch.bfloat16
        models = (
            (gpt2(bf16, 1024, 48, 1600, 25, 50257), (1, 4, 8)),
            (llama(bf16, 4096, 8, 4096, 32, 128256), (1, 2, 4)),
        )
    else:
        fp32 = torch.float32
        models = (gpt2(fp32, 256, 4, 384, 6, 4096), (1, 4)), (llama(fp32, 256, 4, 512, 8, 4096), (1, 4))
    for model, batches in models:
        yield from product((model,), batches, ("none", "full"))


class Trainer:
    """AdamW steps on one device; narrow parameters have a master copy in fp32, as the planner counts them."""

    def __init__(self, model: ModelSpec, batch: int, recompute: Recompute, device: torch.device) -> None:
        torch.manual_seed(0)
        self.module = cast(PreTrainedModel, model.build().to(device).train())
        if recompute == "full":
            self.module.activation_checkpointing_enable({"use_reentrant": False})
        self.inputs = {name: tensor.to(device) for name, tensor in model.inputs(batch).items()}
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.masters = [p.detach().float() if p.dtype.itemsize < 4 else p for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=device.type == "cuda")

    def step(self) -> None:
        """One forward, backward and update."""
        loss = self.module(**self.inputs)
        (loss if isinstance(loss, torch.Tensor) else loss.loss).backward()
        if self.masters[0] is self.parameters[0]:
            self.optimizer.step()
        else:
            self._update_masters()
        self.module.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _update_masters(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.optimizer.step()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.copy_(master)
            master.grad = None


@dataclass(frozen=True)
class Row:
    """One training: predicted and measured seconds of a step and bytes at its peak (None: not measured)."""

    name: str
    predicted_s: float
    measured_s: float
    predicted_bytes: float
    measured_bytes: float | None

    def cells(self) -> tuple[str, ...]:
        """The row as text, errors signed."""
        memory = ("-", "-")
        if self.measured_bytes is not None:
            memory = units.gigabytes(self.measured_bytes), error(self.predicted_bytes, self.measured_bytes)
        times = units.seconds(self.predicted_s), units.seconds(self.measured_s)
        return (
            self.name,
            *times,
            error(self.predicted_s, self.measured_s),
            units.gigabytes(self.predicted_bytes),
            *memory,
        )


def error(predicted: float, measured: float) -> str:
    """By how much the prediction exceeds the measurement."""
    return f"{100 * (predicted / measured - 1):+.1f} %"


def row(
    model: ModelSpec, batch: int, recompute: Recompute, cluster: Cluster, device: torch.device, limit_s: float
) -> Row:
    """Train, predict, compare."""
    trainer = Trainer(model, batch, recompute, device)
    measured_s = time_call(trainer.step, limit_s).seconds
    measured_bytes = peak_bytes(trainer.step, device)
    plan = api.evaluate(
        model, cluster, global_batch=batch, microbatch_size=batch, recompute=recompute, zero_stage=0
    )
    name = f"{model.name}, batch {batch}, recompute {recompute}"
    return Row(name, plan.prediction.step_s, measured_s, allocated_bytes(plan), measured_bytes)


def peak_bytes(step: Callable[[], None], device: torch.device) -> float | None:
    """The most that a step has allocated; nobody counts it on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def allocated_bytes(plan: Plan) -> float:
    """The predicted peak without what the allocator does not count as allocated."""
    ledger = plan.stages[0].memory_bytes
    return plan.prediction.peak_memory_bytes - sum(ledger[name] for name in ("reserved", "fragmentation"))


def one_device(profile: Profile) -> Cluster:
    """A cluster of the measured device alone."""
    alone = Level("device", 1, 1.0, 0.0, "switch")
    cluster = Cluster("here", "this machine", accelerator_of(profile), 1, 1, (alone,))
    return hardware_db.calibrated(cluster, profile)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is any)")
    parser.add_argument("--profile", type=Path, help="a profile of this device (default: measure it now)")
    parser.add_argument("--seconds", type=float, default=5.0, help="at most for each training (default: 5)")
    options = parser.parse_args()
    device = device_of(options.device)
    profile = calibrate(device.type) if options.profile is None else hardware_db.load_profile(options.profile)
    cluster = one_device(profile)
    rows = [row(*case, cluster, device, options.seconds) for case in cases(device)]
    head = ("training", "predicted", "measured", "error", "predicted", "measured", "error")
    print(f"{profile.device}, torch {profile.software['torch']}, {profile.num_threads} threads")
    print("\n".join(table([head, *(row.cells() for row in rows)], right=(1, 2, 3, 4, 5, 6), indent="")))
    off = sum(abs(row.predicted_s / row.measured_s - 1) for row in rows) / len(rows)
    print(f"mean absolute error of the step time: {units.percent(off)}")


if __name__ == "__main__":
    main()
