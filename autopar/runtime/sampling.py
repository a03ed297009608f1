"""Which samples a replica takes at each step."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, IterableDataset, Sampler

from autopar.runtime.hashing import hashed
from autopar.runtime.mesh import replica
from autopar.runtime.samples import Sample


def shuffled(position: int, num_samples: int, seed: int) -> int:
    """The sample at a position of an endless run through all samples, every epoch in an order of its own.

    The order is never written down: a Feistel network permutes the numbers below a power of 4, and what is
    not a sample is permuted again.
    """
    epoch, index = divmod(position, num_samples)
    half = max(1, ((num_samples - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & (1 << half) - 1
        for turn in range(4):
            mixed = hashed(f"{seed} {epoch} {turn} {right}")
            left, right = right, left ^ mixed & (1 << half) - 1
        index = left << half | right
        if index < num_samples:
            return index


@dataclass(frozen=True)
class StepSampler(Sampler[list[int]]):
    """The samples that one replica takes at each step: known by the number of the step alone, so that a
    restart goes on where training was."""

    num_samples: int
    first_step: int
    num_steps: int
    replica: int
    num_replicas: int
    batch: int
    seed: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.num_steps):
            first = (step * self.num_replicas + self.replica) * self.batch
            yield [shuffled(first + row, self.num_samples, self.seed) for row in range(self.batch)]

    def __len__(self) -> int:
        return max(0, self.num_steps - self.first_step)


class _Part(IterableDataset[Sample]):
    """What one replica takes of an iterable, from one step on: whole batches, as many as every other one,
    without what is left at the end."""

    def __init__(self, samples: Any, first_step: int, replica: int, num_replicas: int, batch: int) -> None:
        self.samples, self.skipped = samples, first_step * num_replicas * batch
        self.replica, self.num_replicas, self.batch = replica, num_replicas, batch

    def __iter__(self) -> Iterator[Sample]:
        if hasattr(self.samples, "skip"):
            left = iter(self.samples.skip(self.skipped))
        else:
            left = islice(iter(self.samples), self.skipped, None)
        mine: list[Sample] = []
        for number, sample in enumerate(left):
            turn, row = divmod(number % (self.num_replicas * self.batch), self.batch)
            if turn == self.replica:
                mine.append(sample)
            if turn == self.num_replicas - 1 and row == self.batch - 1:  # all replicas have theirs
                yield from mine
                mine = []


def batches(
    samples: Any, mesh: DeviceMesh, batch: int, first_step: int, options: argparse.Namespace
) -> Iterable[Sample]:
    """What this rank's replica trains on at each step from `first_step` on: `batch` samples.

    Samples by index are shuffled; of an iterable, replicas take `batch` in turn.
    """
    number, count = replica(mesh)
    pinned = torch.cuda.is_available()
    if not hasattr(samples, "__getitem__"):
        part = _Part(samples, first_step, number, count, batch)
        return DataLoader(part, batch, num_workers=min(1, options.workers), pin_memory=pinned)
    sampler = StepSampler(len(samples), first_step, options.steps, number, count, batch, options.seed)
    return DataLoader(samples, batch_sampler=sampler, num_workers=options.workers, pin_memory=pinned)
