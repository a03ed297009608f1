"""The proof that travels with a program, and the reference it is held against.

`reference` runs the original model in one process: loss, every gradient of the first step, and parameters
after three AdamW steps. `parity.py`, saved beside the program, runs the program on the same weights and data
and compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW

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
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    was_training = model.training
    model.train()
    has_master = precision is not None and precision.has_master
    optimizer = (MasterAdamW if has_master else AdamW)(model.parameters(), lr=LEARNING_RATE, eps=EPSILON)
    scale = LossScale() if precision is not None and precision.needs_loss_scale else None
    losses = []
    gradients: dict[str, Tensor] = {}
    for step in range(num_steps):
        total = 0.0
        _set_gradient_dtype(model, precision)
        for rows in _microbatches(tensors, num_microbatches, num_replicas):
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
    return {
        "weights": weights,
        "batch": tensors,
        "losses": losses,
        "gradients": gradients,
        "parameters": parameters,
        "buffers": buffers,
        "tied": _tied(model),
        "optimizer": {"lr": LEARNING_RATE, "eps": EPSILON},
    }


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


PARITY = '''"""Compare this program with the original model: loss, every gradient, and parameters after AdamW.

    torchrun --nproc-per-node N parity.py

reads `reference.pt`, which holds what the original model did in one process, and exits with 1 where the
program does something else.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from autopar_runtime import gather, replica_part, start, updated
from model import PLACEMENTS
from train import OPTIMIZER, build, forward_backward

# Relative, by the least precise dtype of the parameters. Models cast to single precision inside, so that even
# in double precision sums in another order differ; AdamW divides small gradients by themselves and enlarges
# that. In half precision both sides are off: the original's own gradients by up to 1.7 % (a norm's bias of
# dinov2 in fp16, against double), so that two of them differ by more than that.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
PARAMETERS_FACTOR = 10


def difference(found: Tensor, wanted: Tensor, floor: float, order: float) -> float:
    """The norm of the difference, relative to the one of `wanted` with elements of at least `floor`; infinite
    where something is not a number."""
    largest: float = max(float(wanted.norm(order)), floor * wanted.numel() ** (1 / order), sys.float_info.min)
    relative = float((found - wanted).norm(order)) / largest
    return relative if math.isfinite(relative) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", type=Path, default=Path(__file__).with_name("reference.pt"))
    arguments = parser.parse_args()
    device = start()
    reference = torch.load(arguments.reference, weights_only=True)
    rank = build(device, reference["weights"])
    named = rank.parameters()
    optimizer = OPTIMIZER(dict.fromkeys(named.values()), **reference["optimizer"])
    batch = replica_part(reference["batch"], rank.mesh, device)
    dtypes = {each.dtype for each in reference["weights"].values()}
    dtype = max(dtypes, key=lambda each: TOLERANCE.get(each, 0.0))
    # In half precision rounding turns the sign of single elements, where a ReLU or AdamW goes by the sign.
    is_half, order = (True, 2.0) if dtype.itemsize == 2 else (False, math.inf)
    largest = max(float(each.abs().max()) for each in reference["gradients"].values())
    rounding = largest * (torch.finfo(dtype).eps if is_half else 1e-4)  # of gradients that should be zero
    worst: dict[str, tuple[float, str]] = {"loss": (0.0, "")}
    for step, wanted in enumerate(reference["losses"]):
        loss = forward_backward(rank, batch).cpu().double()
        off = difference(loss, torch.tensor(wanted, dtype=torch.float64), 1e-12, math.inf)
        worst["loss"] = max(worst["loss"], (off, f"step {step + 1}"))
        if dist.get_rank() == 0:
            print(f"step {step + 1}  loss {loss.item():.8f}  original {wanted:.8f}", flush=True)
        if step == 0:
            gradients = {name: each.grad for name, each in named.items() if each.grad is not None}
            found = gather(gradients, rank.mesh, PLACEMENTS)
            worst["gradients"] = compare(found, reference["gradients"], rounding, order)
            missing = untied(reference["gradients"], reference["tied"]) - untied(found, reference["tied"])
            if missing:
                worst["gradients"] = (float("inf"), f"no gradient for {', '.join(sorted(missing))}")
        optimizer.step()
        optimizer.zero_grad()
    found = gather(updated(named, optimizer), rank.mesh, PLACEMENTS, named)
    farthest = reference["optimizer"]["lr"] * len(reference["losses"])  # that AdamW moves any parameter
    wanted = reference["parameters"]
    if any(each.dtype != reference["weights"][name].dtype for name, each in wanted.items()):
        # Master copies: they tell more exactly how far AdamW went.
        found, wanted = moved(found, reference["weights"]), moved(wanted, reference["weights"])
        farthest /= 10
    if is_half:  # AdamW takes full steps also by gradients that should be zero
        felt = {name: each.abs() > rounding for name, each in reference["gradients"].items()}
        found = {name: each.cpu() * felt[name] for name, each in found.items() if name in felt}
        wanted = {name: wanted[name] * felt[name] for name in found}
    worst["parameters"] = compare(found, wanted, farthest, order)
    stages = rank.stages.values()
    buffers = {name: each for stage in stages for name, each in stage.named_buffers()}
    known = {name: each for name, each in buffers.items() if name in reference["buffers"]}
    if found := gather(known, rank.mesh, PLACEMENTS):  # running statistics
        worst["buffers"] = compare(found, reference["buffers"], 1e-3)
    limits = {what: TOLERANCE[dtype] * (PARAMETERS_FACTOR if what == "parameters" else 1) for what in worst}
    equal = all(value <= limits[what] for what, (value, _) in worst.items())
    if dist.get_rank() == 0:
        for what, (value, where) in worst.items():
            print(f"{what}: largest relative difference {value:.2e} of {limits[what]:.0e} allowed ({where})")
        print(f"{'equal' if equal else 'NOT EQUAL'} to the original", flush=True)
    dist.destroy_process_group()
    sys.exit(0 if equal else 1)


def compare(
    found: dict[str, Tensor], wanted: dict[str, Tensor], floor: float, order: float = math.inf
) -> tuple[float, str]:
    """The largest difference and where it is. What the program does not use, it does not hold."""
    wide = {name: each.cpu().double() for name, each in found.items()}
    return max((difference(each, wanted[name].double(), floor, order), name) for name, each in wide.items())


def moved(found: dict[str, Tensor], began: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far parameters are from where they began."""
    return {name: each.cpu().double() - began[name].double() for name, each in found.items()}


def untied(tensors: dict[str, Tensor], tied: dict[str, str]) -> set[str]:
    """The names of tensors, a tied parameter under its first one: a stage holds the paths that it uses."""
    return {tied.get(name, name) for name in tensors}


if __name__ == "__main__":
    main()
'''
