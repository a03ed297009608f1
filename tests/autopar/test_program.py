"""Emitted programs as text: what a reviewer, a linter and a second run see."""

from __future__ import annotations

import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

import autopar
from autopar.errors import RewriteError
from autopar.plan import Parallelism, Recompute
from autopar.rewrite.program import Program, rewrite
from graphs import Capture, capture
from tests.autopar.random_plans import plan_of, random_plan
from tests.models import case

PLANS = {
    "tp2": Parallelism(tp=2, microbatch_size=2),
    "dp2 tp2 pp2": Parallelism(
        dp_replicate=2, tp=2, pp=2, microbatch_size=2, num_microbatches=2, recompute="selective"
    ),
    "zero3": Parallelism(dp_shard=2, zero_stage=3, microbatch_size=2, num_microbatches=2, recompute="full"),
}


@cache
def captured(name: str) -> Capture:
    torch.manual_seed(0)
    return capture(case(name).build(), case(name).inputs, name=name)


@cache
def program(name: str, plan: str) -> Program:
    return rewrite(captured(name), random_plan(captured(name), PLANS[plan], seed=1))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2", "bert", "t5", "mixtral", "vit", "resnet"])
def test_programs_pass_a_linter_and_compile_without_warnings(name: str, plan: str, tmp_path: Path) -> None:
    directory = program(name, plan).save(tmp_path / "program")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--line-length", "110"]
    command += ["--select", "E,F,I,UP,B", "."]
    checked = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    for path in sorted(directory.glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(path.read_text(), str(path), "exec")


def test_the_same_plan_gives_the_same_bytes() -> None:
    torch.manual_seed(0)
    again = capture(case("gpt2").build(), case("gpt2").inputs, name="gpt2")
    plan = random_plan(again, PLANS["dp2 tp2 pp2"], seed=1)
    assert dict(rewrite(again, plan).files) == dict(program("gpt2", "dp2 tp2 pp2").files)


def test_equal_layers_are_one_class_that_says_where_it_stands() -> None:
    source = program("llama", "zero3").source
    assert source.count("class LlamaDecoderLayer") == 1
    assert '"""`model.layers.*`, 2 times a `LlamaDecoderLayer`."""' in source
    assert "for layer in self.model.layers.values():" in source
    assert "layer(x, cos, sin, keep=keep_nothing)" in source


def test_a_program_is_no_longer_than_a_person_would_write() -> None:
    """Lines of code of the plain data-parallel model; the published modeling file has over 500."""
    lines = [line for line in program("llama", "zero3").source.splitlines() if line.strip()]
    assert len(lines) < 130


def test_every_collective_says_which_states_it_stands_between() -> None:
    lines = program("gpt2", "tp2").source.splitlines()
    calls = [index for index, line in enumerate(lines) if "all_reduce(" in line or "reduce_scatter(" in line]
    assert calls
    for index in calls:
        near = "\n".join(lines[max(0, index - 12) : index + 12])
        assert "# tp: P/R -> " in near


def test_saving_needs_a_directory_and_overwrites_only_when_told(tmp_path: Path) -> None:
    made = program("mlp", "tp2")
    file = tmp_path / "file"
    file.write_text("not a directory")
    with pytest.raises(RewriteError, match="is a file; give a directory"):
        made.save(file)
    directory = made.save(tmp_path / "new" / "program")
    with pytest.raises(RewriteError, match=r"already holds model\.py.*force=True"):
        made.save(directory)
    (directory / "model.py").write_text("changed")
    made.save(directory, force=True)
    assert (directory / "model.py").read_text() == made.source


def test_a_plan_of_another_model_is_refused() -> None:
    plan = autopar.evaluate(captured("mlp"), "local-cpu*2", global_batch=4, dp=2)
    with pytest.raises(RewriteError, match=r"made for mlp with .* this is gpt2 with"):
        autopar.compile(captured("gpt2"), plan)


def test_a_strategy_that_an_op_does_not_offer_is_refused_by_name() -> None:
    model = captured("mlp")
    plan = random_plan(model, PLANS["tp2"], seed=0)
    strategies = {**plan.strategies["tp"], "linear": "nonsense"}
    wrong = plan_of(model.graph, PLANS["tp2"], {"tp": strategies})
    with pytest.raises(
        RewriteError, match=r"gives linear .* 'nonsense' on axis tp, but the model offers replicate"
    ):
        rewrite(model, wrong)


@pytest.mark.parametrize("mode", ["attention", "alternate"])
def test_recomputation_that_is_not_emitted_says_what_is(mode: Recompute) -> None:
    model = captured("gpt2")
    plan = autopar.evaluate(model, "local-cpu*2", global_batch=4, tp=2, recompute=mode)
    with pytest.raises(RewriteError, match=f"recompute='{mode}' .* one of none, full, selective, mixed"):
        autopar.compile(model, plan)


def test_1f1b_without_a_microbatch_for_each_stage_is_refused() -> None:
    model = captured("gpt2")
    plan = autopar.evaluate(model, "local-cpu*2", global_batch=4, pp=2, microbatch_size=4)
    assert plan.prediction.step_s > 0
    with pytest.raises(
        RewriteError, match=r"1F1B needs a microbatch for each of its 2 stages, got 1; .*GPipe"
    ):
        autopar.compile(model, plan)


def test_experts_of_a_model_that_has_none_are_refused() -> None:
    degrees = Parallelism(ep=2, dp_replicate=2, microbatch_size=2)
    with pytest.raises(RewriteError, match=r"ep=2, but mlp has no experts .*use ep=1"):
        rewrite(captured("mlp"), plan_of(captured("mlp").graph, degrees, {}))
