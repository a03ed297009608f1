"""What a model moves is what its plan was priced with: as many collectives of each kind, as many bytes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import hardware_db
from autopar.search.programs import Programs
from graphs import capture
from tests.autopar.programs_on_ranks import Trial, dtype_of, prepare, trial
from tests.autopar.rank_pool import shared_pool
from tests.models import case

pytestmark = pytest.mark.distributed

OBSERVER = Path(__file__).with_name("observe_collectives.py")
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
    for index, each in enumerate(TRIALS):
        program = prepare(each, tmp_path / str(index))
        outcome = shared_pool().run(OBSERVER, 2, program)
        assert outcome.verdict == "equal", outcome.verdict
        observed = {kind: tuple(found) for kind, found in json.loads(outcome.output).items()}
        assert observed == predicted(each), str(each)
