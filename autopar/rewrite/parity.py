"""The proof that travels with a program, and the reference it is held against.

`reference` runs the original model in one process: loss, every gradient of the first step, and parameters
after three AdamW steps. `parity.py`, saved beside the program, runs the program on the same weights and data
and compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.errors import RewriteError
from autopar.rewrite.precision import Precision
from autopar.runtime.loss_scale import LossScale
from autopar.runtime.optimizers import MasterAdamW, updated

NUM_STEPS = 3
LEARNING_RATE = 1e-3
EPSILON = 1e-5
"""Of AdamW: large enough that a gradient that is zero but for rounding moves nothing, also where a model
works in single precision inside."""


def reference(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    num_microbatches: int,
    loss_name: str,
    num_replicas: int = 1,
    precision: Precision | None = None,
    num_steps: int = NUM_STEPS,
) -> dict[str, object]:
    """What the original model does on a global batch: the content of `reference.pt`.

    Microbatches weigh the same, as they do in the program: the loss is the mean of the losses of
    `num_microbatches` microbatches. Each takes its rows from all `num_replicas` parts of the batch, as the
    replicas do at the same time: where samples meet (batch norm, a contrastive loss, a mean over labels that
    count), it matters which. What is no tensor in the batch goes with every microbatch. `precision` is that
    of the program (None: all in that of the model). The model is left as it was.
    Raises RewriteError where gradients of the model itself overflow in half precision.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    was_training = model.training
    model.train()
    has_master = precision is not None and precision.has_master
    optimizer = (MasterAdamW if has_master else AdamW)(model.parameters(), lr=LEARNING_RATE, eps=EPSILON)
    scale = LossScale() if precision is not None and precision.needs_loss_scale else None
    losses = []
    narrowest = _Narrowest()
    gradients: dict[str, Tensor] = {}
    for step in range(num_steps):
        total = 0.0
        _set_gradient_dtype(model, precision)
        for rows in _microbatches(tensors, num_microbatches, num_replicas):
            with narrowest:
                loss = _loss(model(**{**batch, **rows}), loss_name) / num_microbatches
            (loss if scale is None else scale.scale(loss)).backward()
            total += loss.item()
        if scale is not None:
            scale.unscale(model.parameters())
        if step == 0:
            gradients = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters(remove_duplicate=False)
                if parameter.grad is not None
            }
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = {name: tensor.detach().clone() for name, tensor in updated(named, optimizer).items()}
    buffers = {name: each.detach().clone() for name, each in model.named_buffers() if name in weights}
    _set_gradient_dtype(model, None)
    model.load_state_dict(weights)
    model.train(was_training)
    if scale is not None:
        _check_overflow(gradients)
    return {
        "weights": weights,
        "batch": tensors,
        "losses": losses,
        "gradients": gradients,
        "parameters": parameters,
        "buffers": buffers,
        "tied": _tied(model),
        "optimizer": {"lr": LEARNING_RATE, "eps": EPSILON},
        "narrowest": narrowest.dtype,
    }


def _check_overflow(gradients: Mapping[str, Tensor]) -> None:
    """Training leaves out a step that overflows; a reference of one would say nothing."""
    overflown = [name for name, each in gradients.items() if not each.isfinite().all()]
    if overflown:
        raise RewriteError(
            f"gradients of the original model overflow in float16 ({overflown[0]}, {len(overflown)} of "
            f"{len(gradients)} parameters) at the loss scale {LossScale().value:g} with which training "
            "begins: there is nothing to compare with; verify it in bfloat16"
        )


class _Narrowest(TorchDispatchMode):
    """The narrowest floating dtype that a forward computes in: models cast to single precision inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.dtype = torch.float64

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        if (
            isinstance(made, Tensor)
            and made.is_floating_point()
            and made.dtype.itemsize < self.dtype.itemsize
        ):
            self.dtype = made.dtype
        return made


def _set_gradient_dtype(model: nn.Module, precision: Precision | None) -> None:
    """Let gradients be added up in the dtype of `precision`; in that of each parameter for None."""
    for parameter in model.parameters():
        is_narrow = precision is not None and parameter.dtype == precision.compute
        parameter.grad_dtype = precision.gradient if is_narrow and precision else parameter.dtype


def _tied(model: nn.Module) -> dict[str, str]:
    """For every further path of a tied parameter, its first path."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        leader = first.setdefault(id(parameter), name)
        if leader != name:
            found[name] = leader
    return found


def _microbatches(batch: Mapping[str, Tensor], count: int, num_replicas: int) -> Iterator[dict[str, Tensor]]:
    """The rows that the replicas, each of which has one run of them, take at a time."""
    for number in range(count):
        yield {
            name: torch.cat([part.chunk(count)[number] for part in rows.chunk(num_replicas)])
            for name, rows in batch.items()
        }


def _loss(output: object, name: str) -> Tensor:
    """The loss in what a model returned: the tensor itself, or an entry by name or position."""
    if isinstance(output, Tensor):
        return output
    found = output[name] if isinstance(output, Mapping) else None
    if found is None and isinstance(output, (tuple, list)):
        found = output[int(name)]
    assert isinstance(found, Tensor), f"the model's output has no loss {name!r}"
    return found


PARITY = '''\
"""Compare this program with the original model: loss, every gradient, and parameters after AdamW.

    torchrun --nproc-per-node N parity.py

reads `reference.pt`, which holds what the original model did in one process, and exits with 1 where the
program does something else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from autopar_runtime import Parity, replica_part, start, updated
from model import PLACEMENTS
from train import OPTIMIZER, build, forward_backward


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, default=Path(__file__).with_name("reference.pt"))
    options = parser.parse_args()
    device = start()
    reference = torch.load(options.reference, weights_only=True)
    rank = build(device, reference["weights"])
    named = rank.parameters()
    optimizer = OPTIMIZER(dict.fromkeys(named.values()), **reference["optimizer"])
    batch = replica_part(reference["batch"], rank.mesh, device)
    parity = Parity(reference, named, rank.mesh, PLACEMENTS)
    for step in range(len(reference["losses"])):
        loss = forward_backward(rank, batch)
        parity.after_backward(step, loss)
        optimizer.step()
        optimizer.zero_grad()
    parity.after_training(updated(named, optimizer), rank.stages.values())
    equal = parity.is_equal()
    dist.destroy_process_group()
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
'''
"""`parity.py`, which is the same for every program."""
