"""The command line: artefacts, exit codes, and messages that a person can act on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.cli import main
from autopar.cli.parser import COMMANDS
from autopar.errors import InfeasibleError
from autopar.plan import Plan

COMMAND = [sys.executable, "-m", "autopar"]

Outcome = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command in this process: exit code, stdout, stderr."""

    def call(*words: object) -> Outcome:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def plan_file(plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    plan.save(path)
    return path


@pytest.mark.parametrize("words", [["--help"], ["hardware"]])
def test_help_and_hardware_do_not_wait_for_torch(words: list[str]) -> None:
    code = (
        f"import sys; from autopar.cli import main; main({words!r});"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "autopar" in done.stdout or "h100-sxm" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"\n  autopar {command} " in out or f"\n  autopar {command}\n" in out


def test_an_unknown_command_suggests_the_closest(run) -> None:
    code, out, err = run("hardwrae")
    assert (code, out) == (2, "")
    assert "did you mean 'hardware'?" in err


def test_no_command_is_bad_usage(run) -> None:
    assert run()[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "gpt2", "dgx-h100", "--global-batch", "0"], "expected at least 1, got 0"),
        (
            ["plan", "gpt2", "dgx-h100", "--global-batch", "8", "--time-limit", "-1"],
            "expected a positive number",
        ),
        (["explain", "p", "--tokens", "many"], "expected a number such as 1e12, got 'many'"),
        (["explain", "missing.json"], "missing.json: No such file or directory"),
        (["hardware", "dgx-h10*16"], "did you mean 'dgx-h100'"),
        (["launch", "{plan}", "--target", "slrum"], "did you mean 'slurm'?"),
        (["plan", "lama3-8b", "dgx-h100", "--global-batch", "8"], "did you mean 'llama3-8b'"),
    ],
)
def test_a_wrong_request_is_one_message_and_exit_code_2(
    run, plan_file: Path, words: list[str], message: str
) -> None:
    code, out, err = run(*(word.format(plan=plan_file) for word in words))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_explain_prints_the_report_of_a_saved_plan(run, plan: Plan, plan_file: Path) -> None:
    code, out, err = run("explain", plan_file, "--tokens", "1e12")
    assert (code, err) == (0, "")
    assert "verdict: optimal" in out
    assert "training on 1.00 T tokens" in out


def test_explain_as_json_has_the_figures_under_names_with_units(run, plan_file: Path) -> None:
    code, out, _ = run("explain", plan_file, "--format", "json")
    assert code == 0
    assert json.loads(out)["verdict"]["step_s"] == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("parallelism"), "is no plan"),
        (lambda content: content.update(version=9), "plan of version 9, this autopar reads 4"),
        (lambda content: content["parallelism"].update(tp=0), "parallelism.tp: Input should be greater"),
        (lambda content: content.update(colour="red"), "colour: Extra inputs are not permitted"),
    ],
)
def test_a_damaged_plan_says_what_is_wrong(run, plan_file: Path, change, message: str) -> None:
    content = json.loads(plan_file.read_text())
    change(content)
    plan_file.write_text(json.dumps(content))
    code, _, err = run("explain", plan_file)
    assert code == 2
    assert message in err


def test_launch_prints_the_script_or_saves_it_once(run, plan_file: Path, tmp_path: Path) -> None:
    code, script, _ = run("launch", plan_file, "--target", "slurm", "--scheduler-option=--partition=train")
    assert code == 0
    assert "#SBATCH --partition=train" in script
    target = tmp_path / "program"
    words = ("launch", plan_file, "--target", "slurm", "-o", target)
    assert run(*words)[1] == f"{target / 'job.sbatch'}\n"
    (target / "job.sbatch").write_text("edited")
    code, _, err = run(*words)
    assert code == 2
    assert "exists and differs" in err
    assert run(*words, "--force")[0] == 0


def test_hardware_shows_one_record_with_values_confidence_and_sources(run) -> None:
    code, out, _ = run("hardware", "h100")
    assert code == 0
    row = next(line for line in out.splitlines() if "peak_dense_flops_per_s.bf16" in line)
    assert row.split()[1:] == ["9.89e+14", "read", "[2]"]
    assert "\n  [2] " in out


def test_hardware_shows_a_cluster_as_the_planner_sees_it(run) -> None:
    out = run("hardware", "dgx-h100*16")[1]
    assert "128 x h100-sxm, 8 in a node" in out
    assert "nvswitch" in out


def test_hardware_json_of_a_cluster_is_a_cluster_file(run, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(run("hardware", "dgx-h100*2", "--format", "json")[1])
    assert "16 x h100-sxm, 8 in a node" in run("hardware", path)[1]


def test_nothing_fits_is_exit_code_1(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from autopar.cli import commands

    def nothing_fits(options: object) -> int:
        raise InfeasibleError("nothing fits: activations exceed memory by 3.0 GB")

    monkeypatch.setattr(commands, "plan", nothing_fits)
    code, out, err = run("plan", "gpt2", "dgx-h100", "--global-batch", "8")
    assert (code, out) == (1, "")
    assert err == "autopar: nothing fits: activations exceed memory by 3.0 GB\n"


def test_a_bug_keeps_its_traceback(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from autopar.cli import commands

    def bug(options: object) -> int:
        raise ValueError("not the user's")

    monkeypatch.setattr(commands, "plan", bug)
    with pytest.raises(ValueError, match="not the user's"):
        run("plan", "gpt2", "dgx-h100", "--global-batch", "8")


def test_interrupt_is_a_word_and_130(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from autopar.cli import commands

    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "hardware", interrupted)
    assert run("hardware") == (130, "", "autopar: interrupted\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = " ".join([*COMMAND, "hardware", "|", "head", "-n", "1"])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "accelerators\n"
    assert done.stderr == ""


MLP = """
import torch
from torch import nn

class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, target):
        return nn.functional.mse_loss(self.down(torch.relu(self.up(x))), target)

def build():
    return MLP(), {"x": torch.randn(4, 32), "target": torch.randn(4, 32)}
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "mlp.py"
    path.write_text(MLP)
    return f"{path}:build"


def test_plan_prints_the_explanation_and_saves_the_plan(run, model: str, tmp_path: Path) -> None:
    saved = tmp_path / "found" / "plan.json"
    words = ("plan", model, "local-cpu*2", "--global-batch", 8, "--tokens", 1e6, "-o", saved)
    code, out, err = run(*words)
    assert code == 0
    assert out.startswith("build (")
    assert "verdict: " in out
    assert "capture ..." in err
    again, explained, _ = run("explain", saved, "--tokens", 1e6)
    assert (again, without_seconds(explained)) == (0, without_seconds(out))
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "exists; choose another name or say --force" in err


def without_seconds(text: str) -> tuple[str, str]:
    """What is said before each layer's processor time, which no file has; and what is left of those lines."""
    before, _, layers = text.partition("problems of each layer")
    assert layers
    return before, re.sub(r" +(-|[\d.]+ \w+)$", "", layers, flags=re.MULTILINE)


def test_plan_as_json_is_the_plan_and_the_same_bytes_every_time(run, model: str) -> None:
    words = ("plan", model, "local-cpu*2", "--global-batch", 8, "--format", "json", "-q")
    code, first, err = run(*words)
    assert (code, err) == (0, "")
    assert Plan.model_validate_json(first).parallelism.world_size == 2
    assert run(*words)[1] == first


def test_pins_are_kept(run, model: str) -> None:
    words = (
        "--tp",
        2,
        "--zero-stage",
        0,
        "--microbatch-size",
        4,
        "--recompute",
        "full",
        "--format",
        "json",
        "-q",
    )
    plan = Plan.model_validate_json(run("plan", model, "local-cpu*2", "--global-batch", 8, *words)[1])
    p = plan.parallelism
    assert (p.tp, p.dp, p.zero_stage, p.microbatch_size, p.recompute) == (2, 1, 0, 4, "full")


def test_evaluate_says_no_with_exit_code_1_when_it_does_not_fit(run, model: str, tmp_path: Path) -> None:
    cluster = tmp_path / "tiny.yaml"
    cluster.write_text(
        "device: {memory_bytes: 1e4, memory_bandwidth_bytes_per_s: 1e9, peak_flops_per_s: {fp32: 1e9}}\n"
        "levels: [{name: bus, devices: 2, bandwidth_bytes_per_s: 1e9, latency_s: 1e-6}]\n"
    )
    code, out, _ = run("evaluate", model, cluster, "--global-batch", 8, "-q")
    assert code == 1
    assert "verdict: does not fit" in out
    assert run("evaluate", model, "local-cpu*2", "--global-batch", 8, "-q")[0] == 0


def test_evaluate_takes_offloading_an_order_of_axes_and_what_is_usable(run, model: str) -> None:
    words = ("evaluate", model, "dgx-a100", "--global-batch", 64, "--format", "json", "-q")
    unusual = ("--tp", 2, "--pp", 2, "--axis-order", "tp,pp,dp_replicate", "--offload", "optimizer")
    problem = ("--memory-gb", 20, "--policy", "sgd-fp32", "--precision", "fp8", "--software", "te-2024")
    plan = Plan.model_validate_json(run(*words, *unusual, *problem)[1])
    assert list(plan.parallelism.mesh) == ["tp", "pp", "dp_replicate"]
    assert plan.parallelism.offload == "optimizer"
    assert (plan.cluster.memory_bytes, plan.prediction.software) == (20e9, "te-2024")
    code, _, err = run(*words, "--axis-order", "tp,dp")
    assert code == 2
    assert "axis_order has 'dp'" in err


def test_degrees_that_do_not_fit_the_devices_are_bad_input(run, model: str) -> None:
    code, _, err = run("evaluate", model, "local-cpu*2", "--global-batch", 8, "--tp", 3, "-q")
    assert code == 2
    assert "tp 3" in err


@pytest.mark.distributed
def test_a_compiled_program_verifies_and_a_changed_one_does_not(run, model: str, tmp_path: Path) -> None:
    program = tmp_path / "program"
    code, out, _ = run("compile", model, "local-cpu*2", "--global-batch", 8, "-o", program, "-q")
    assert code == 0
    assert {Path(line).name for line in out.splitlines()} >= {
        "model.py",
        "train.py",
        "parity.py",
        "plan.json",
    }
    verify = [*COMMAND, "verify", str(program), "--model", model, "--ranks", "2", "-q"]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "equal to the original" in done.stdout
    source = (program / "model.py").read_text()
    (program / "model.py").write_text(source.replace("relu", "sigmoid"))
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "NOT EQUAL" in done.stdout


def test_compile_refuses_what_it_cannot_use_before_it_works(
    run, model: str, plan_file: Path, tmp_path: Path
) -> None:
    code, _, err = run("compile", model, "local-cpu*2", "-o", tmp_path / "program")
    assert code == 2
    assert "needs --global-batch" in err
    code, _, err = run("compile", model, plan_file, "--global-batch", 8, "-o", tmp_path / "program")
    assert code == 2
    assert "for a global batch of 64" in err
    code, _, err = run("compile", model, plan_file, "-o", tmp_path / "program", "-q")
    assert code == 2
    assert "the plan was made for llama3-8b" in err
