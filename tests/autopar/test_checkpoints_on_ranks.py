"""Checkpoints: saved under one plan, loaded under any other, into the original model and out of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed.checkpoint.state_dict_loader as loader
import torch.distributed.checkpoint.state_dict_saver as saver
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.plan import Parallelism
from autopar.runtime.checkpoints import Trained
from autopar.runtime.host_adamw import HostAdamW
from autopar.runtime.layout import Layout, Placements, Split
from autopar.runtime.optimizers import LocalAdamW, MasterAdamW, updated
from autopar.runtime.weights import load
from graphs import capture
from tests.autopar.training_on_ranks import loaded, train, write
from tests.models import case

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
"""A test reads and writes checkpoints in one process."""

Degrees = dict[str, object]

CHAINS: dict[str, tuple[str, torch.dtype, float, tuple[Degrees, ...]]] = {
    "shards, then stages of shards": (
        "gpt2",  # its fused query, key and value are split by sections
        torch.float64,
        1e-5,
        (
            {"dp_shard": 4, "zero_stage": 3, "num_microbatches": 2},
            {"tp": 2, "pp": 2, "microbatch_size": 4, "num_microbatches": 2},
        ),
    ),
    "experts apart, replicated and sharded": (
        "mixtral",
        torch.float32,
        1e-5,
        (
            {"dp_replicate": 4, "ep": 2, "num_microbatches": 2},
            {"dp_shard": 4, "ep": 2, "zero_stage": 3, "num_microbatches": 2},
        ),
    ),
    "master copies in the optimizer, then as uneven shards": (
        "gpt2",
        torch.bfloat16,
        1e-3,
        (
            {"dp_replicate": 3, "microbatch_size": 4},
            {"dp_shard": 3, "zero_stage": 3, "microbatch_size": 2, "num_microbatches": 2},
        ),
    ),
}
"""A model, its dtype, how far apart losses may be, and plans that train it in turn, before one process."""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("chain", CHAINS)
def test_training_goes_on_under_another_plan(chain: str, tmp_path: Path) -> None:
    """Two steps under each plan are, losses and all, as if it had been one process all the time."""
    name, dtype, close, plans = CHAINS[chain]
    torch.manual_seed(0)
    model = case(name).build().to(dtype)
    captured = capture(model, case(name).inputs, name=name)
    torch.save(dict(case(name).inputs(64)), tmp_path / "data.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    options = ("--data", tmp_path / "data.pt", "--weights", tmp_path / "weights.pt", "--checkpoints")
    batch = Parallelism.model_validate(plans[0]).global_batch
    alone = write(captured, tmp_path / "alone", None, microbatch_size=batch)
    wanted = train(alone, 1, "--steps", 6, *options, tmp_path / "at once")
    found: list[str] = []
    for number, degrees in enumerate(plans):
        program = write(captured, tmp_path / str(number), None, **degrees)
        num_ranks = Parallelism.model_validate(degrees).world_size
        found += train(program, num_ranks, "--steps", 2 * number + 2, *options, tmp_path / "in turns")
    found += train(alone, 1, "--steps", 6, *options, tmp_path / "in turns")
    assert list(map(float, found)) == pytest.approx(list(map(float, wanted)), rel=close)
    kept = sorted(path.name for path in (tmp_path / "in turns").iterdir())
    assert kept == ["step-4", "step-6"], "the first one went"
    if dtype == torch.bfloat16:
        return  # rounding turns signs of gradients that are zero but for it
    ended, again = (loaded(model, tmp_path / each / "step-6") for each in ("at once", "in turns"))
    torch.testing.assert_close(again, ended, rtol=0, atol=close)
    assert any(not torch.equal(each, model.state_dict()[name]) for name, each in ended.items())

    state = {}
    for each in ("at once", "in turns"):
        moments = {key: torch.zeros_like(value) for key, value in model.named_parameters()}
        state[each] = {f"optimizer.state.{key}.exp_avg_sq": value for key, value in moments.items()}
        loader.load(state[each], checkpoint_id=tmp_path / each / "step-6", no_dist=True)
    torch.testing.assert_close(state["in turns"], state["at once"], rtol=0, atol=close)


@pytest.mark.slow
@pytest.mark.distributed
def test_weights_come_from_every_kind_of_file(tmp_path: Path) -> None:
    """`save_pretrained` leaves out the second name of a tied parameter and writes several files."""
    torch.manual_seed(0)
    model = case("gpt2").build()
    captured = capture(model, case("gpt2").inputs, name="gpt2")
    program = write(captured, tmp_path / "program", tp=2, microbatch_size=2)
    cast(Any, model).save_pretrained(tmp_path / "safetensors", max_shard_size="100KB")
    assert len(list((tmp_path / "safetensors").glob("*.safetensors"))) > 2
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    saver.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    sources = ("safetensors", "weights.pt", "checkpoint")
    losses = [train(program, 2, "--steps", 1, "--weights", tmp_path / source) for source in sources]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, LocalAdamW, MasterAdamW, HostAdamW])
def test_every_optimizer_goes_on_where_it_was(kind: Any, tmp_path: Path) -> None:
    """bf16 parameters, and one that never has a gradient; what is read is in the dtype that reads it."""

    def begin() -> tuple[nn.Module, Trained]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
        return model, Trained([model], kind(list(model.parameters()), lr=0.01), cast(DeviceMesh, None), {})

    def step(model: nn.Module, trained: Trained, number: int) -> None:
        model[0](torch.full((2, 4), float(number), dtype=torch.bfloat16)).sum().backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()

    model, trained = begin()
    for number in range(3):
        step(model, trained, number)
    saver.save(trained.state(), checkpoint_id=tmp_path, no_dist=True)
    again, restored = begin()
    restored.restore(tmp_path)
    assert "optimizer.state.1.weight.exp_avg" not in restored.state()
    for number in range(3, 6):
        step(model, trained, number)
        step(again, restored, number)
    for found, wanted in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, wanted)
    master = updated(dict(model.named_parameters()), trained.optimizer)["0.weight"]
    assert (master.dtype == torch.float32) == (kind in (MasterAdamW, HostAdamW))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    mesh = cast(DeviceMesh, None)

    def trained(model: nn.Module) -> Trained:
        return Trained([model], torch.optim.AdamW(model.parameters()), mesh, {})

    saver.save(trained(nn.Linear(2, 3)).state(), checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match=r"weight has the shape \(3, 2\) in the weights, \(4, 2\)"):
        trained(nn.Linear(2, 4)).restore(tmp_path)
    with pytest.raises(ValueError, match=r"no '0.weight'.*state_dict"):
        trained(nn.Sequential(nn.Linear(2, 3))).restore(tmp_path)


@dataclass(frozen=True)
class Group:
    num_ranks: int
    number: int

    def size(self) -> int:
        return self.num_ranks

    def rank(self) -> int:
        return self.number


@dataclass(frozen=True)
class Mesh:
    """What a layout asks of a mesh."""

    groups: dict[str, Group]

    def get_group(self, axis: str) -> Group:
        return self.groups[axis]


def meshes(**sizes: int) -> Iterator[DeviceMesh]:
    for ranks in product(*(range(size) for size in sizes.values())):
        groups = {axis: Group(sizes[axis], rank) for axis, rank in zip(sizes, ranks, strict=True)}
        yield cast(DeviceMesh, Mesh(groups))


SPLITS: tuple[dict[str, Split], ...] = (
    {},
    {"tp": Split(1)},
    {"tp": Split(0, (12, 4))},
    {"tp": Split(0), "ep": Split(0)},
    {"ep": Split(0, (8, 8)), "tp": Split(0)},
    {"tp": Split(1, (4, 8)), "ep": Split(0)},
)


@pytest.mark.parametrize("splits", SPLITS)
def test_the_rectangles_of_all_ranks_are_the_tensor(splits: dict[str, Split]) -> None:
    """Every rank holds what slicing gives it; together they hold every element equally often."""
    whole = torch.arange(16 * 12).view(16, 12)
    placements: Placements = {"weight": splits}
    seen = torch.zeros_like(whole)
    for mesh in meshes(tp=2, ep=4):
        mine = whole
        for axis, split in splits.items():
            group = mesh.get_group(axis)
            sections = split.sections or (mine.shape[split.dim],)
            parts = [
                part.chunk(group.size(), split.dim)[group.rank()] for part in mine.split(sections, split.dim)
            ]
            mine = torch.cat(parts, split.dim)
        layout = Layout.of("weight", mine, mesh, placements)
        assert layout.shape == whole.shape
        for ((top, bottom), (left, right)), piece in layout.pieces(mine):
            assert torch.equal(piece, whole[top:bottom, left:right])
            seen[top:bottom, left:right] += 1
    assert (seen == seen[0, 0]).all()


class Sliced:
    """Weights on disk, which remember what was read of them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.num_read = tensor, 0

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, part: Any) -> torch.Tensor:
        found = self.tensor[part]
        self.num_read += found.numel()
        return found


def test_a_rank_reads_no_more_than_its_part() -> None:
    whole = torch.randn(8, 6)
    for mesh in meshes(tp=4):
        linear, weights = nn.Linear(6, 2, bias=False), {"weight": Sliced(whole)}
        load(linear, weights, mesh, {"weight": {"tp": Split(0, (4, 4))}})
        assert weights["weight"].num_read == whole.numel() // 4
        rank = mesh.get_group("tp").rank()
        assert torch.equal(linear.weight, whole[[rank, 4 + rank]])


def test_a_tied_parameter_is_found_under_any_of_its_names() -> None:
    head, aliases = nn.Module(), {"lm_head.weight": "wte.weight"}
    head.lm_head = nn.Linear(2, 3, bias=False)
    saved = {"wte.weight": torch.randn(3, 2)}
    mesh = cast(DeviceMesh, None)
    load(head, saved, mesh, {}, aliases)
    assert torch.equal(head.lm_head.weight, saved["wte.weight"])
    with pytest.raises(ValueError, match=r"no 'lm_head.weight'.*state_dict"):
        load(head, saved, mesh, {})


def test_names_that_are_others_with_a_prefix_are_told_apart(tmp_path: Path) -> None:
    """A model with both `a` and `model.a`, saved by `train.py` under `model.`."""
    mesh = cast(DeviceMesh, None)
    outer = nn.Module()
    outer.a = nn.Parameter(torch.zeros(2))
    outer.model = nn.Module()
    outer.model.a = nn.Parameter(torch.zeros(2))
    plain = {"a": torch.full((2,), 1.0), "model.a": torch.full((2,), 2.0)}
    moment = {"optimizer.state.a.exp_avg": torch.zeros(2)}
    saved = {f"model.{name}": each for name, each in plain.items()} | moment
    for number, state in enumerate((plain, saved)):
        saver.save(state, checkpoint_id=tmp_path / str(number), no_dist=True)
        for weights in (state, tmp_path / str(number)):
            load(outer, weights, mesh, {})
            assert [outer.a.tolist(), outer.model.a.tolist()] == [[1.0, 1.0], [2.0, 2.0]]
