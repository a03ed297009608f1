"""The training entry: data, the order of samples, learning rates, and a restart that nobody can tell."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autopar.runtime import sampling
from autopar.runtime.log import Expected, Log
from autopar.runtime.options import learning_rate
from autopar.runtime.samples import Inputs, open_data
from autopar.runtime.sampling import StepSampler, batches, shuffled
from graphs import capture
from tests.autopar.training_on_ranks import loaded, train, write
from tests.models import case

INPUTS: Inputs = {
    "input_ids": ((4,), torch.int64, 100),
    "attention_mask": ((4,), torch.int64, 2),
    "labels": ((4,), torch.int64, 100),
}


def options(**given: object) -> argparse.Namespace:
    usual: dict[str, object] = {
        "data": None, "token_dtype": "uint16", "shift": False, "seed": 0, "workers": 0, "steps": 10,
        "learning_rate": 1.0, "warmup": 0, "final_rate": 1.0,
    }  # fmt: skip
    return argparse.Namespace(**usual | given)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("plan", ["replicas", "shards"])
def test_a_restart_changes_nothing(plan: str, tmp_path: Path) -> None:
    """Bit for bit, in bf16 with master copies and with dropout: losses, and what is saved at the end."""
    torch.manual_seed(0)
    model = case("gpt2").build()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    model.to(torch.bfloat16)
    degrees = {"replicas": {"dp_replicate": 2}, "shards": {"dp_shard": 2, "zero_stage": 3}}[plan]
    captured = capture(model, case("gpt2").inputs, name="gpt2")
    program = write(captured, tmp_path / "program", None, num_microbatches=2, **degrees)
    assert "dropout" in (program / "model.py").read_text()
    (tmp_path / "tokens").write_bytes(torch.randint(128, (700,), dtype=torch.int16).numpy().tobytes())
    saved = tmp_path / "saved"
    run = ("--steps", 4, "--data", tmp_path / "tokens", "--checkpoints", saved, "--save-every", 2)
    rates = ("--warmup", 2, "--final-rate", 0.1, "--learning-rate", 0.01)
    at_once = train(program, 2, *run, *rates)
    ended = loaded(model, saved / "step-4")
    shutil.rmtree(saved / "step-4")
    assert train(program, 2, *run, *rates) == at_once[2:]
    assert len(set(at_once)) == 4
    again = loaded(model, saved / "step-4")
    assert all(torch.equal(again[name], each) for name, each in ended.items())


ENDING = """
import torch

def samples():
    return ({name: torch.arange(16) for name in ("input_ids", "labels")} for number in range(15))
"""
"""Three steps of four samples, and a part of a fourth."""


@pytest.mark.slow
@pytest.mark.distributed
def test_data_that_end_end_training_and_lose_nothing(tmp_path: Path) -> None:
    captured = capture(case("llama").build(), case("llama").inputs, name="llama")
    program = write(captured, tmp_path / "program", dp_replicate=2, num_microbatches=2)
    (tmp_path / "data.py").write_text(ENDING)
    run = ("--data", f"{tmp_path}/data.py:samples", "--checkpoints", tmp_path / "saved", "--save-every", 2)
    assert len(train(program, 2, "--steps", 9, *run)) == 3
    assert (tmp_path / "saved" / "step-3" / ".metadata").exists()
    assert not train(program, 2, "--steps", 9, *run), "nothing is left after a restart"


@pytest.mark.parametrize("num_samples", [1, 2, 5, 64, 1000])
def test_every_epoch_is_another_order_of_all_samples(num_samples: int) -> None:
    epochs = [
        [shuffled(epoch * num_samples + index, num_samples, seed=3) for index in range(num_samples)]
        for epoch in range(2)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_samples))
    if num_samples > 5:
        assert epochs[0] != epochs[1]
        moved = sum(abs(sample - index) for index, sample in enumerate(epochs[0])) / num_samples
        assert moved > num_samples / 5, "a random order moves a sample by a third of all on the average"


def test_replicas_share_out_what_one_would_take() -> None:
    def steps(first: int, replica: int, count: int, batch: int) -> list[list[int]]:
        return list(StepSampler(50, first, 6, replica, count, batch, seed=0))

    whole = steps(0, 0, 1, 8)
    halves = [steps(0, replica, 2, 4) for replica in range(2)]
    assert [left + right for left, right in zip(*halves, strict=True)] == whole
    assert steps(4, 0, 1, 8) == whole[4:], "a restart goes on where it was"


class Stream:
    """Samples one after the other, as `datasets.IterableDataset` gives them, which can skip: enough for five
    steps of two replicas, and a sixth of one alone."""

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return ({"x": torch.tensor(number)} for number in range(self.first, 34))

    def skip(self, count: int) -> Stream:
        return Stream(self.first + count)


@pytest.mark.parametrize("kind", ["skips", "does not"])
def test_a_stream_is_shared_out_in_turns_and_goes_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(replica: int, first_step: int) -> list[list[int]]:
        monkeypatch.setattr(sampling, "replica", lambda mesh: (replica, 2))
        samples: Any = Stream() if kind == "skips" else list(Stream()).__iter__()
        found = batches(samples, cast(DeviceMesh, None), 3, first_step, options())
        return [batch["x"].tolist() for batch in found]

    assert taken(0, 0) == [[0, 1, 2], [6, 7, 8], [12, 13, 14], [18, 19, 20], [24, 25, 26]]
    assert taken(1, 2) == [[15, 16, 17], [21, 22, 23], [27, 28, 29]]


def test_a_file_of_tokens_is_cut_into_samples(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(torch.arange(10, dtype=torch.int16).numpy().tobytes())
    samples = open_data(options(data=str(path)), INPUTS, "input_ids", "labels")
    assert len(samples) == 2
    assert samples[1]["input_ids"].tolist() == samples[1]["labels"].tolist() == [4, 5, 6, 7]
    assert samples[1]["attention_mask"].tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"a file of tokens does not fill pixels; give a dict of tensors"):
        open_data(
            options(data=str(path)), {**INPUTS, "pixels": ((4,), torch.float32, 0)}, "input_ids", "labels"
        )
    shifted = open_data(options(data=str(path), shift=True), INPUTS, "input_ids", "labels")
    assert shifted[1]["labels"].tolist() == [5, 6, 7, 8]
    path.write_bytes(torch.full((8,), 500, dtype=torch.int16).numpy().tobytes())
    with pytest.raises(ValueError, match=r"token 500 .* the model knows 100"):
        open_data(options(data=str(path)), INPUTS, "input_ids", "labels")[0]
    path.write_bytes(b"\0\0")
    with pytest.raises(ValueError, match=r"has 1 tokens .* a sample takes 4"):
        open_data(options(data=str(path)), INPUTS, "input_ids", "labels")


def test_other_sources_of_data(tmp_path: Path) -> None:
    synthetic = open_data(options(), INPUTS)
    assert synthetic[7]["input_ids"].tolist() == synthetic[7]["input_ids"].tolist()
    assert synthetic[7]["input_ids"].tolist() != synthetic[8]["input_ids"].tolist()
    assert open_data(options(seed=2**30), INPUTS)[7]["input_ids"].shape == (4,), "of any seed"
    torch.save({"x": torch.arange(6).view(3, 2)}, tmp_path / "rows.pt")
    assert open_data(options(data=str(tmp_path / "rows.pt")), {})[2]["x"].tolist() == [4, 5]
    (tmp_path / "mine.py").write_text("def samples():\n    return [{'x': 1}, {'x': 2}]\n")
    assert open_data(options(data=f"{tmp_path}/mine.py:samples"), {}) == [{"x": 1}, {"x": 2}]
    with pytest.raises(ValueError, match="no such file or directory; give a file of tokens"):
        open_data(options(data=str(tmp_path / "nothing.bin")), {}, "x", "y")


def test_the_log_tells_speed_and_how_near_it_is_to_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of 2 s each, told together: 1000 tokens and 6e12 FLOPs a step, on a device of 1e13."""
    clock = iter([0.0, 4.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    expected = Expected(tokens=1000, model_flops=6e12, peak_flops_per_s=1e13, step_s=1.0)
    log = Log(expected, options(log_every=2, tensorboard=None))
    log.step(1, loss=torch.tensor(3.0))
    log.step(2, loss=torch.tensor(2.5), learning_rate=0.1)
    told = capsys.readouterr().out
    assert told == "step 2  loss 2.5  learning_rate 0.1  tokens/s 500  MFU 0.3  MFU/predicted 0.5\n"


def test_the_learning_rate_rises_and_falls_by_a_cosine() -> None:
    given = options(steps=12, warmup=4, final_rate=0.1, learning_rate=2.0)
    rates = [learning_rate(step, given) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)
    assert list(islice((learning_rate(step, options()) for step in range(3)), 3)) == [1.0, 1.0, 1.0]
