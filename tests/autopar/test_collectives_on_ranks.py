"""What a model moves is what its plan was priced with: as many collectives of each kind, as many bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import hardware_db
from autopar.search.programs import Programs
from graphs import capture
from tests.autopar.programs_on_ranks import Trial, dtype_of, prepare, trial
from tests.models import case

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
TRIALS = (
    trial("gpt2", tp=2),
    trial("bert", tp=2, sequence_parallel=False),
    trial("llama", cp=2),
    trial("bert", cp=2),
    trial("llama", dp_replicate=2),
    trial("mixtral", dp_replicate=2, ep=2),
    trial("deepseekv3", dp_replicate=2, ep=2),
)


def predicted(trial: Trial) -> dict[str, tuple[int, float]]:
    """Kind -> number and bytes of one microbatch's forward and backward, all ranks together."""
    parallelism = trial.parallelism
    model = case(trial.model)
    programs = Programs(
        capture(model.build().to(dtype_of(trial)), model.inputs, name=trial.model),
        hardware_db.cluster(f"local-cpu*{parallelism.world_size}"),
        shorten=False,
    )
    counts: Counter[str] = Counter()
    num_bytes: dict[str, float] = defaultdict(float)
    for unit in programs.given(parallelism).chain.units:
        for kernels in unit.kernels:
            for move in (*kernels.forward_moves, *kernels.backward_moves):
                counts[move.kind] += 1
                num_bytes[move.kind] += parallelism.world_size * move.num_bytes
    return {kind: (count, num_bytes[kind]) for kind, count in counts.items()}


@pytest.mark.slow
def test_models_move_what_their_plans_say(tmp_path: Path) -> None:
    directories = [prepare(each, tmp_path / str(index)) for index, each in enumerate(TRIALS)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m"]
    command += ["tests.autopar.observe_collectives", *map(str, directories)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = dict(re.findall(r"^(/.*): (\{.*\})$", done.stdout, re.MULTILINE))
    assert len(found) == len(TRIALS), done.stderr[-4000:]
    observed = {str(each): json.loads(found[str(at)]) for each, at in zip(TRIALS, directories, strict=True)}
    assert observed == {str(each): {k: list(v) for k, v in predicted(each).items()} for each in TRIALS}
