"""The command line: artefacts, exit codes, and messages that a person can act on."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("words", [["--help"], ["hardware"], *([command, "--help"] for command in COMMANDS)])
def test_help_and_hardware_do_not_wait_for_torch(words: list[str]) -> None:
    code = (
        f"import sys, time; from autopar.cli import main; main({words!r});"
        "sys.exit('torch was imported' if 'torch' in sys.modules else time.process_time() > 0.5)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "took more than half a second"
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
        (lambda content: content.update(version=9), "plan of version 9, this autopar reads 1"),
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
