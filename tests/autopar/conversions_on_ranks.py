"""Hold every conversion of the runtime against its definition, on the ranks of a torchrun job.

Rank 0 prints the number of conversions that were right, or a rank fails.
"""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from autopar.localize import conversion_dims, zigzag_argument
from autopar.placements import PR, RP, RR, Shard, State, sharded
from autopar.runtime import collectives, experts, gradients, losses, split_ops
from autopar.strategies import conversion
from tests.autopar.simulated_ranks import convert, deal

SHAPE = (4, 16, 12)
ZIGZAG = sharded(1, zigzag=True), sharded(1, (8, 8), zigzag=True)
STATES = (RR, RP, PR, sharded(0), sharded(1), sharded(2), sharded(1, (8, 8)), sharded(2, (4, 8)), *ZIGZAG)


def everybody() -> ProcessGroup:
    """The group of all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return group


def check(before: State, after: State) -> bool:
    """Value and gradient of one change of state, on this rank; False where there is no such conversion."""
    how = conversion(before, after, requires_grad=True)
    if how is None or before == after:
        return False
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(SHAPE, generator=generator)
    gradient = torch.randn(SHAPE, generator=generator)
    parts = [part.detach().requires_grad_() for part in deal(whole, before.value, size)]
    wanted = convert(parts, before, after)
    torch.autograd.backward(wanted, deal(gradient, after.grad, size))

    mine = parts[rank].detach().clone().requires_grad_()
    dims, order = conversion_dims(how, before, after), zigzag_argument(before, after)
    made = getattr(collectives, how.name)(mine, everybody(), *dims, **order)
    made.backward(deal(gradient, after.grad, size)[rank])
    what = f"{how.name}: {before} -> {after}"
    same(made, wanted[rank], after.value, what)
    same(mine.grad, parts[rank].grad, before.grad, f"gradient of {what}")
    return True


def same(found: torch.Tensor | None, wanted: torch.Tensor | None, placement: object, what: str) -> None:
    """Equal on every rank; of a partial value only the sum means anything."""
    assert found is not None
    assert wanted is not None
    if not isinstance(placement, Shard) and str(placement) == "P":
        found, wanted = found.detach().clone(), wanted.detach().clone()
        dist.all_reduce(found)
        dist.all_reduce(wanted)
    torch.testing.assert_close(found, wanted, msg=lambda text: f"{what}: {text}")


def check_cross_entropy() -> int:
    """Rows or classes split over the ranks, with ignored labels that are not spread evenly, and smoothing."""
    rank, size, world = dist.get_rank(), dist.get_world_size(), everybody()
    count = 0
    for smoothing, reduction in itertools.product((0.0, 0.1), ("mean", "sum")):
        logits = torch.randn(8, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
        target = torch.tensor([-100, 3, 11, -100, 0, 7, 5, 1])
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
        wanted = F.cross_entropy(logits, target, **options)
        wanted.backward()
        rows = logits.detach().chunk(size)[rank].requires_grad_()
        loss = losses.cross_entropy(rows, target.chunk(size)[rank], rows=[world], **options)
        loss.backward()
        dist.all_reduce(total := loss.detach().clone())
        torch.testing.assert_close(total, wanted.detach())
        torch.testing.assert_close(rows.grad, logits.grad.chunk(size)[rank])
        classes = logits.detach().chunk(size, 1)[rank].contiguous().requires_grad_()
        loss = losses.sharded_cross_entropy(classes, target, world, **options)
        loss.backward()
        torch.testing.assert_close(loss.detach(), wanted.detach())
        torch.testing.assert_close(classes.grad, logits.grad.chunk(size, 1)[rank])
        count += 2
    return count


def check_embedding() -> int:
    """Rows of the table split over the ranks, the padding row without gradient."""
    rank, size = dist.get_rank(), dist.get_world_size()
    table = torch.randn(12, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    indices = torch.tensor([[0, 11, 5], [3, 5, 6]])
    wanted = F.embedding(indices, table, padding_idx=5)
    wanted.square().sum().backward()
    mine = table.detach().chunk(size)[rank].clone().requires_grad_()
    found = collectives.all_reduce(
        split_ops.embedding(indices, mine, everybody(), padding_idx=5), everybody()
    )
    found.square().sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(mine.grad, table.grad.chunk(size)[rank])
    return 1


def check_causal_attention() -> int:
    """Rows of the queries split over the ranks in either order, with fewer heads of keys than of queries."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 4, 16, 8), (2, 2, 16, 8), (2, 2, 16, 8))
    queries, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    wanted = F.scaled_dot_product_attention(queries, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    count = 0
    for zigzag in (False, True):
        rows = sharded(2, zigzag=zigzag).value
        query = deal(queries, rows, size)[rank]
        found = split_ops.causal_attention(
            query, key, value, everybody(), zigzag=zigzag, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(found, deal(wanted, rows, size)[rank])
        count += 1
    return count


def check_experts() -> int:
    """Rows reach the ranks of their experts sorted by expert, none lost, and come back where they were; so do
    gradients."""
    rank, size, num_experts = dist.get_rank(), dist.get_world_size(), 8
    generator = torch.Generator().manual_seed(rank)
    keys = torch.randint(num_experts, (10 + rank,), generator=generator).sort().values
    keys = keys.where(keys != 5, 4)  # an expert without rows
    ends = torch.bincount(keys, minlength=num_experts).cumsum(0).int()
    x = torch.stack([keys, torch.full_like(keys, rank), torch.arange(len(keys))], 1).double().requires_grad_()
    here, routes = experts.exchange_counts(ends, everybody())
    rows = experts.to_experts(x, routes, everybody())
    found = rows.detach().long().tolist()
    assert found == sorted(found), "by expert, then by rank, then as they were"
    mine = torch.bincount(rows.detach()[:, 0].long(), minlength=num_experts).chunk(size)
    assert mine[rank].cumsum(0).tolist() == here.tolist()
    assert sum(map(len, found)) == 3 * int(mine[rank].sum())
    back = experts.from_experts(rows * rows, routes, len(x), everybody())
    torch.testing.assert_close(back, x * x)
    back.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x)
    return 1


def check_buckets() -> int:
    """Gradients of several dtypes and sizes, in buckets smaller than some of them."""
    size = dist.get_world_size()
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3,), (2, 5), (), (7,))]
    parameters.append(torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    parameters.append(torch.nn.Parameter(torch.zeros(2)))
    for index, parameter in enumerate(parameters[:-1]):
        parameter.grad = torch.full_like(parameter, index + dist.get_rank())
    gradients.sum_gradients(parameters, everybody(), bucket_bytes=32)
    for index, parameter in enumerate(parameters[:-1]):
        torch.testing.assert_close(
            parameter.grad, torch.full_like(parameter, index * size + sum(range(size)))
        )
    assert parameters[-1].grad is None
    return 1


def main() -> None:
    dist.init_process_group("gloo")
    assert prod(SHAPE) % dist.get_world_size() == 0
    pairs = list(itertools.product(STATES, STATES))
    count = sum(check(before, after) for before, after in pairs)
    count += (
        check_cross_entropy()
        + check_embedding()
        + check_causal_attention()
        + check_experts()
        + check_buckets()
    )
    if dist.get_rank() == 0:
        print(f"right: {count}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
