"""Launchers: what they render, that a shell accepts it, and that it starts real ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.errors import AutoparError, InvalidParallelismError
from autopar.launch import TARGETS, JobSpec, job_of, launch
from autopar.launch.slurm import render as render_slurm
from autopar.launch.torchrun import render as render_torchrun
from autopar.plan import Parallelism, Plan

ALL_REDUCE = """
import os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor(float(dist.get_rank() + 1))
dist.all_reduce(total)
assert os.environ["OMP_NUM_THREADS"] == "1"
open(f"rank{dist.get_rank()}", "w").write(f"{total.item():g} {sys.argv[1:]} {os.environ.get('MOTTO')}")
dist.destroy_process_group()
"""


def with_parallelism(plan: Plan, **degrees: int) -> Plan:
    return plan.model_copy(update={"parallelism": Parallelism.model_validate(degrees)})


def test_job_fills_whole_nodes_in_order(plan: Plan) -> None:
    job = job_of(plan)
    assert (job.num_nodes, job.nproc_per_node, job.devices) == (8, 8, "gpu")
    assert job_of(with_parallelism(plan, tp=4)).nproc_per_node == 4


def test_ranks_that_do_not_fill_nodes_are_refused_with_the_numbers(plan: Plan) -> None:
    with pytest.raises(InvalidParallelismError, match=r"12 ranks do not fill nodes of 8 .*12 = 1 \* 8 \+ 4"):
        job_of(with_parallelism(plan, dp_shard=12))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_nodes", [1, 4])
def test_bash_accepts_every_script(target: str, num_nodes: int) -> None:
    job = JobSpec(
        "a-job", num_nodes, 8, comment='dp8 "quoted" $(false)', env=(("MOTTO", 'a "b" $c `d` {e} \\'),)
    )
    for name, text in TARGETS[target](job).items():
        checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, f"{name}: {checked.stderr}"


def test_slurm_asks_for_what_the_plan_needs(plan: Plan) -> None:
    options = ("--partition=train", "--account=ml")
    text = launch(plan, "slurm", time_limit_s=90_000, scheduler_options=options).files["job.sbatch"]
    header = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"--nodes=8", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=1-01:00:00", *options} <= header
    assert "--nnodes=8" in text
    assert "--nproc-per-node=8" in text


def test_rendering_does_not_depend_on_anything_but_the_job(plan: Plan) -> None:
    for target in TARGETS:
        assert launch(plan, target).files == launch(plan, target).files


def test_unknown_target_and_field_name_the_known_ones(plan: Plan) -> None:
    with pytest.raises(AutoparError, match="did you mean 'slurm'"):
        launch(plan, "slrum")
    with pytest.raises(AutoparError, match="no partition; its fields are name, num_nodes"):
        launch(plan, "slurm", partition="train")


def test_save_keeps_a_file_that_somebody_edited(plan: Plan, tmp_path: Path) -> None:
    files = launch(plan, "torchrun")
    (path,) = files.save(tmp_path)
    assert os.access(path, os.X_OK)
    files.save(tmp_path)
    path.write_text("mine")
    with pytest.raises(AutoparError, match="exists and differs"):
        files.save(tmp_path)
    files.save(tmp_path, force=True)
    assert path.read_text() == files.files["launch.sh"]


def run_script(script: Path, *arguments: str, **env: str) -> None:
    """Run it from elsewhere, with the torchrun of this Python first on the path."""
    (script.parent / "train.py").write_text(ALL_REDUCE)
    path = os.pathsep.join([env.pop("PATH", ""), str(Path(sys.executable).parent), os.environ["PATH"]])
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        ["bash", str(script), *arguments],
        env=clean | env | {"PATH": path},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.distributed
def test_torchrun_script_starts_two_ranks(tmp_path: Path) -> None:
    motto = 'a "b" $c `d` {e} \\'
    job = JobSpec(
        "pair", 1, 2, script_args=("--name", "two words"), env=(("OMP_NUM_THREADS", "1"), ("MOTTO", motto))
    )
    script = tmp_path / "launch.sh"
    script.write_text(render_torchrun(job)["launch.sh"])
    run_script(script, "--more")
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == f"3 ['--name', 'two words', '--more'] {motto}"


@pytest.mark.distributed
def test_slurm_script_starts_two_ranks_under_a_stand_in_for_slurm(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\nprintf 'localhost\\nother\\n'\n")
    (tools / "srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    script = tmp_path / "job.sbatch"
    script.write_text(render_slurm(JobSpec("pair", 1, 2))["job.sbatch"])
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(tmp_path)}
    run_script(script, "--steps", "3", PATH=str(tools), RENDEZVOUS_PORT="29517", MOTTO="slurm", **slurm)
    assert (tmp_path / "rank1").read_text() == "3 ['--steps', '3'] slurm"
