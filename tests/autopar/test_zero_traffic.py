"""ZeRO gathers and scatters as often as it is priced: once a step, or with every microbatch."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
from autopar.plan import Parallelism
from graphs import capture
from tests.models import case

NUM_MICROBATCHES = 3
NUM_BLOCKS = 2


class Counting(TorchDispatchMode):
    """Counts the collectives of `fully_shard`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            self.counts[name.removeprefix("c10d::").strip("_").removesuffix("_base")] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two whose collectives move nothing: enough to count them."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("zero_stage", "gathers", "scatters"),
    [
        (1, NUM_BLOCKS + 1, NUM_BLOCKS + 1),
        (2, NUM_BLOCKS + 1, NUM_MICROBATCHES * (NUM_BLOCKS + 1)),
        # Blocks for the forward and for the backward, recomputation included; what is left once for both.
        (3, NUM_MICROBATCHES * (2 * NUM_BLOCKS + 1), NUM_MICROBATCHES * (NUM_BLOCKS + 1)),
    ],
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_parameters_are_gathered_as_often_as_priced(
    zero_stage: int, gathers: int, scatters: int, recompute: str, two_ranks: None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = case("llama").build()
    captured = capture(model, case("llama").inputs, name="llama")
    degrees = {
        "dp_shard": 2,
        "zero_stage": zero_stage,
        "num_microbatches": NUM_MICROBATCHES,
        "recompute": recompute,
    }
    plan = autopar.evaluate(captured, "local-cpu*2", parallelism=Parallelism.model_validate(degrees))
    autopar.compile(captured, plan).save(tmp_path)
    sys.path.insert(0, str(tmp_path))
    try:
        train = importlib.import_module("train")
        rank = train.build(torch.device("cpu"), model.state_dict())
        batch = dict(case("llama").inputs(NUM_MICROBATCHES))
        with Counting() as mode:
            train.forward_backward(rank, batch)
    finally:
        sys.path.remove(str(tmp_path))
        for name in ("train", "model", "autopar_runtime"):
            sys.modules.pop(name, None)
    assert (mode.counts["allgather"], mode.counts["reduce_scatter"]) == (gathers, scatters), mode.counts
