"""What a search may be asked beside model, cluster and batch: optimizer, precision, software, memory."""

from __future__ import annotations

from functools import cache

import pytest

import hardware_db
from autopar import api
from autopar.errors import InfeasibleError, InvalidParallelismError
from autopar.plan import Parallelism, Plan
from autopar.request import cluster_of, training_policy, with_memory
from autopar.search.evaluate import Evaluator
from autopar.search.given import GivenPrograms, evaluate_given
from autopar.search.planner import Planner
from autopar.search.shallow import shallow
from costmodel import CostModelError, optimizer_policy, software
from graphs import Capture
from tests.autopar.small_models import cluster as toys
from tests.autopar.small_models import tower


@cache
def wide() -> Capture:
    """Products large enough for 8 bits to pay."""
    return tower(width=4096, depth=2, vocabulary=1024, sequence=1024)


def test_policy_and_software_are_taken_by_name_and_by_value() -> None:
    named = api.evaluate(tower(), toys(4), global_batch=4, policy="sgd-fp32", software="te-2024")
    values = api.evaluate(
        tower(), toys(4), global_batch=4, policy=optimizer_policy("sgd-fp32"), software=software("te-2024")
    )
    assert named.to_json() == values.to_json()
    assert named.prediction.software == "te-2024"
    usual = api.evaluate(tower(), toys(4), global_batch=4, software="te-2024")
    assert named.stages[0].memory_bytes["optimizer"] == 0 < usual.stages[0].memory_bytes["optimizer"]
    with pytest.raises(CostModelError, match="sgd-fp32"):
        api.evaluate(tower(), toys(4), global_batch=4, policy="sgd")


def test_the_search_keeps_to_the_policy() -> None:
    """AdamW's 16 bytes for a parameter do not fit where the 8 of SGD do."""
    room_bytes = 12 * tower().graph.num_parameters

    def planned(policy: str | None) -> Plan:
        pins = {"tp": 1, "pp": 1, "zero_stage": 0}
        cluster = toys(2, room_bytes)
        return api.plan(tower(), cluster, global_batch=8, policy=policy, pins=pins, price_pins=False)

    assert planned("sgd-fp32").fits
    with pytest.raises(InfeasibleError, match="largest part is optimizer"):
        planned(None)


def test_memory_is_used_as_far_as_allowed() -> None:
    whole = api.evaluate(tower(), toys(4), global_batch=4)
    part = api.evaluate(tower(), toys(4), global_batch=4, memory_bytes=1e8)
    assert (whole.fits, part.fits, part.cluster.memory_bytes) == (True, False, 1e8)
    assert part.prediction == whole.prediction
    tight = api.plan(tower(), toys(4), global_batch=8, memory_bytes=1e8)
    assert tight.prediction.peak_memory_bytes <= 1e8
    with pytest.raises(InvalidParallelismError, match="hold nothing"):
        cluster_of(toys(4), 0.0)


def test_memory_that_is_given_says_where_it_is_from() -> None:
    device = with_memory(hardware_db.cluster("dgx-h100"), 70e9, "measured").device
    assert device.memory_bytes == pytest.approx(70e9)
    assert device.memory.capacity_bytes.note == "measured"


# --- products in 8 bits -------------------------------------------------------------------------------------


def test_products_of_blocks_in_8_bits_are_faster_and_the_plan_says_that_programs_have_none() -> None:
    usual = api.evaluate(wide(), "dgx-h100", global_batch=8, tp=8)
    low = api.evaluate(wide(), "dgx-h100", global_batch=8, tp=8, precision="fp8")
    assert low.prediction.terms_s["compute"] < usual.prediction.terms_s["compute"]
    assert "products in repeated blocks are priced in fp8; the program runs them in fp32" in low.warnings
    assert usual.warnings == ()
    older = api.evaluate(wide(), "dgx-a100", global_batch=8, tp=8, precision="fp8")
    assert any(
        "in fp8, which" in text and "A100" in text and "runs as bf16" in text for text in older.warnings
    )


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_low_precision_costs_the_same_in_a_search_as_in_a_record(tp: int) -> None:
    cluster, era = hardware_db.cluster("dgx-h100"), software("te-2024")
    policy = training_policy(wide().graph)
    p = Parallelism(
        tp=tp, dp_replicate=8 // tp, microbatch_size=2, sequence_parallel=True if tp > 1 else None
    )
    planner = Planner(wide(), cluster, policy, era, global_batch=16, low_precision="fp8")
    given = evaluate_given(GivenPrograms(shallow(wide())), Evaluator(cluster, policy, era), p, "fp8")
    found = planner.as_given(p).evaluated
    assert found.step_s == pytest.approx(given.step_s, rel=5e-3)  # replicas count a loss's samples together
    assert found.peak_memory_bytes == pytest.approx(given.peak_memory_bytes, rel=1e-6)


@pytest.mark.parametrize("era", ["torch-eager", "te-2024"])
@pytest.mark.parametrize("low_precision", [None, "fp8"])
def test_floors_hold_whatever_the_precision(era: str, low_precision: str | None) -> None:
    cluster = hardware_db.cluster("dgx-h100")
    planner = Planner(
        wide(), cluster, training_policy(wide().graph), software(era), global_batch=16, pins=None,
        low_precision=low_precision,
    )  # fmt: skip
    for tp in (2, 4, 8):
        floor_s = planner.programs.least.floor_s(2, tp)
        for split in (None, True, False):
            p = Parallelism(tp=tp, microbatch_size=2, sequence_parallel=split, num_microbatches=8)
            took_s = planner.layer.table(planner.programs.program(p)).microbatch_s
            assert 0.5 * took_s < floor_s <= took_s * (1 + 1e-9)
