"""The figures of accuracy: against values known by hand, and against brute force."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import autopar.records
from autopar.cli import main
from autopar.errors import AutoparError
from autopar.records.assess import select
from autopar.records.baselines import constant_utilisation, constant_utilisation_error
from autopar.records.json import accuracy_json
from autopar.records.metrics import Accuracy, Prediction, Row, accuracy
from autopar.records.schema import Record, read_records
from autopar.records.sweeps import average_ranks, spearman
from autopar.records.table import accuracy_text
from benchmarks.accuracy import BEGIN, END, TARGETS, replace_between_markers, targets_text
from benchmarks.scatter import scatter_svg

SEQ, DEVICES, BATCH = 1000, 8, 16
PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"


def facts(id_: str, group: str = "g", step_time_s: float | None = None, **changes: Any) -> dict[str, Any]:
    """A record as a file has it: measured in seconds, unless `changes` say otherwise."""
    sizes = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 4, "ffn_hidden": 256, "vocab": 100}
    return {
        "id": id_,
        "group": group,
        "source": "made up",
        "tier": "A",
        "model": {**sizes, "gated_mlp": False, "seq": SEQ},
        "cluster": {"accelerator": "A100-80GB", "devices_per_node": 8, "n_devices": DEVICES},
        "parallelism": {"dp": 8},
        "batch": {"global_batch": BATCH, "micro_batch": 1},
        "precision": "bf16",
        "measured": {} if step_time_s is None else {"step_time_s": step_time_s},
        **changes,
    }


def record(*words: Any, **changes: Any) -> Record:
    return Record.model_validate(facts(*words, **changes))


def predicted(id_: str, step_time_s: float | None = None, **changes: Any) -> Prediction:
    return Prediction(
        id_, step_time_s, changes.pop("memory_bytes", None), changes.pop("fits", True), **changes
    )


def compared(records: Iterable[Record], *times_s: float) -> Accuracy:
    """The accuracy when the records are predicted at these times."""
    rows = list(records)
    return accuracy(rows, [predicted(row.id, time_s) for row, time_s in zip(rows, times_s, strict=True)])


def test_the_error_is_that_of_the_step_time() -> None:
    assert Row(record("a", "g", 2.0), predicted("a", 2.5)).error == pytest.approx(0.25)
    assert Row(record("a", "g", 2.0), predicted("a", None)).error is None


def test_without_a_global_batch_the_error_is_that_of_the_time_per_token() -> None:
    """8 devices at 500 tokens/s each make 4000 tokens/s: a step of 4 samples of 1000 tokens takes 1 s."""
    unknown = record("a", batch={"micro_batch": 1}, measured={"tokens_per_s_per_device": 500})
    assert unknown.step_time_s is None
    assert Row(unknown, predicted("a", 1.1, global_batch=4)).error == pytest.approx(0.1)
    assert "global_batch is unknown" in (Row(unknown, predicted("a", 1.1)).failure or "")
    assert Row(unknown, predicted("a", None)).failure == "no step time was predicted"


def test_figures_are_averaged_within_groups_first() -> None:
    """A group of three rows off by 10 % and a group of one off by 50 % are off by 30 %, not by 20 %."""
    records = [record(name, "large", 1.0) for name in "abc"] + [record("d", "small", 1.0)]
    found = compared(records, 1.1, 0.9, 1.1, 1.5)
    large, small = found.groups
    assert large.mean_error == pytest.approx(0.1)
    assert small.mean_error == pytest.approx(0.5)
    assert large.bias == pytest.approx(0.1 / 3)
    assert found.overall.mean_error == pytest.approx(0.3)
    assert found.overall.bias == pytest.approx((0.1 / 3 + 0.5) / 2)
    assert found.overall.worst_error == pytest.approx(0.5)
    assert [row.record.id for row in found.worst(1)] == ["d"]


def test_the_worst_error_keeps_its_sign() -> None:
    assert compared([record(n, "g", 1.0) for n in "ab"], 0.4, 1.5).groups[0].worst_error == pytest.approx(
        -0.6
    )


def test_a_row_that_cannot_be_predicted_is_counted_and_named() -> None:
    records = [record("good", "g", 1.0), record("bad", "g", 1.0)]
    found = accuracy(records, [predicted("good", 1.1), predicted("bad", failure="no such accelerator")])
    group = found.groups[0]
    assert (group.num_rows, group.num_failures) == (2, 1)
    assert group.mean_error == pytest.approx(0.1)
    text = accuracy_text(found)
    assert "1/2" in text
    assert "bad: no such accelerator" in text


def test_memory_is_compared_where_it_was_measured() -> None:
    gib = 2.0**30
    records = [record("a", "g", 1.0, measured={"step_time_s": 1.0, "memory_gib": 10}), record("b", "g", 1.0)]
    found = accuracy(
        records, [predicted("a", 1.0, memory_bytes=9 * gib), predicted("b", 1.0, memory_bytes=5 * gib)]
    )
    group = found.groups[0]
    assert group.memory_error == pytest.approx(0.1)
    assert group.num_memory_rows == 1


def test_published_lack_of_memory_is_caught_or_not() -> None:
    records = [record(name, "g", tier="oom") for name in ("caught", "missed", "failed")]
    records.append(record("ran", "g", 1.0))
    found = accuracy(
        records,
        [
            predicted("caught", fits=False),
            predicted("missed", 2.0),
            predicted("failed", failure="no price"),
            predicted("ran", 1.0, fits=False),
        ],
    )
    group = found.groups[0]
    assert (group.num_out_of_memory, group.num_caught, group.num_false_alarms) == (3, 1, 1)
    assert (group.num_rows, group.num_failures) == (4, 1)
    assert group.mean_error == 0.0
    assert "1/3" in accuracy_text(found)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        # The textbook case of IQ and hours of television: 1 - 6 * 194 / (10 * 99).
        (
            [106, 100, 86, 101, 99, 103, 97, 113, 112, 110],
            [7, 27, 2, 50, 28, 29, 20, 12, 6, 17],
            -29 / 165,
        ),
        # Ties: ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4 have covariance 4.5 and squares 4.5 and 5.
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / (4.5 * 5) ** 0.5),
        ([1, 1, 1], [1, 2, 3], None),
        ([1], [1], None),
        ([], [], None),
    ],
)
def test_rank_correlation_of_known_cases(
    first: list[float], second: list[float], expected: float | None
) -> None:
    found = spearman(first, second)
    assert found == (None if expected is None else pytest.approx(expected))


def test_average_ranks_are_places_counted_one_by_one() -> None:
    values = np.random.default_rng(0).integers(0, 6, size=40)
    counted = [(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values]
    assert average_ranks(values).tolist() == counted


def test_a_sweep_is_ranked_and_its_regret_is_what_the_first_choice_costs() -> None:
    """Predicted order b, a, c; measured a 1.0, b 1.2, c 2.0: the choice b is 20 % slower than a."""
    records = [record("a", "g", 1.0), record("b", "g", 1.2), record("c", "g", 2.0)]
    group = compared(records, 1.1, 1.0, 3.0).groups[0]
    assert group.num_sweeps == 1
    assert group.rank_correlation == pytest.approx(0.5)
    assert group.regret == pytest.approx(0.2)


@pytest.mark.parametrize(
    "change",
    [
        {"batch": {"global_batch": 32}},
        {"precision": "fp8"},
        {"cluster": {"accelerator": "H100-80GB", "devices_per_node": 8, "n_devices": 8}},
        {"model": {**facts("x")["model"], "layers": 3}},
    ],
)
def test_only_configurations_of_one_job_are_a_sweep(change: dict[str, Any]) -> None:
    records = [record("a", "g", 1.0), record("b", "g", 1.2), record("c", "g", 2.0, **change)]
    group = compared(records, 1.0, 1.0, 1.0).groups[0]
    assert (group.num_sweeps, group.rank_correlation, group.regret) == (0, None, None)


def test_the_best_configuration_counts_for_the_regret_though_it_was_not_predicted() -> None:
    records = [record(n, "g", t) for n, t in zip("abcd", (1.0, 2.0, 3.0, 4.0), strict=True)]
    known = [predicted(n, t) for n, t in zip("bcd", (2.0, 3.0, 4.0), strict=True)]
    group = accuracy(records, [predicted("a", failure="no price"), *known]).groups[0]
    assert group.regret == pytest.approx(1.0)
    assert group.rank_correlation == pytest.approx(1.0)


def utilised(id_: str, group: str, share: float) -> Record:
    return record(id_, group, 1.0, derived={"mfu_noncausal_vs_bf16_peak": share})


def test_the_constant_utilisation_is_the_best_there_is() -> None:
    shares = np.random.default_rng(1).uniform(0.1, 0.7, size=12)
    records = [utilised(str(i), f"g{i % 3 if i < 9 else 0}", share) for i, share in enumerate(shares)]

    def error(utilisation: float) -> float:
        groups = [[row for row in records if row.group == name] for name in ("g0", "g1", "g2")]
        return float(np.mean([constant_utilisation_error(rows, utilisation) for rows in groups]))

    best = constant_utilisation(records)
    assert best is not None
    assert error(best) <= min(map(error, np.linspace(0.05, 0.9, 2000))) + 1e-9


def test_a_row_that_ran_at_the_constant_utilisation_has_no_error() -> None:
    """At half of the assumed utilisation a row takes twice as long as predicted."""
    assert constant_utilisation_error([utilised("a", "g", 0.4)], 0.4) == 0.0
    assert constant_utilisation_error([utilised("a", "g", 0.2)], 0.4) == pytest.approx(0.5)
    assert constant_utilisation([record("a", "g", 1.0)]) is None


def test_other_tools_are_compared_on_their_own_rows() -> None:
    quoted = {"anchor_predictions": {"toolx_step_time_s": 1.2, "toolx_alloc_gib": 9.0}}
    measured = {"step_time_s": 1.0, "memory_gib": 10}
    found = compared([record("a", "g", None, measured=measured, **quoted), record("b", "h", 1.0)], 1.1, 1.1)
    (tool,) = found.groups[0].other_tools
    assert (tool.name, tool.num_rows) == ("toolx", 1)
    assert tool.mean_error == pytest.approx(0.2)
    assert tool.memory_error == pytest.approx(0.1)
    assert found.groups[1].other_tools == ()
    assert found.overall.other_tools[0].mean_error == pytest.approx(0.2)
    assert "toolx" in accuracy_text(found)


def test_left_out_errors_are_shown_beside() -> None:
    records = [record("a", "g", 1.0), record("b", "h", 1.0)]
    predictions = [predicted(row.id, 1.1) for row in records]
    found = accuracy(records, predictions, {"g": 0.2, "h": 0.4})
    assert [group.left_out_error for group in found.groups] == [0.2, 0.4]
    assert found.overall.left_out_error == pytest.approx(0.3)
    assert " left out" in accuracy_text(found)
    assert " left out" not in accuracy_text(accuracy(records, predictions))


@pytest.fixture
def mixed() -> Accuracy:
    """Long names, every kind of figure, and a failure that takes many words."""
    names = [f"megatron-bridge-qwen3-30b-a3b-{i}" for i in range(4)]
    records = [
        record(
            f"{name}-configuration-with-a-long-name-{row}",
            name,
            1.0 + row,
            measured={"step_time_s": 1.0 + row, "memory_gib": 10},
            derived={"mfu_noncausal_vs_bf16_peak": 0.3},
            anchor_predictions={
                "calculon_step_time_s": 2.0,
                "simumax_step_time_s": 1.0,
                "simumax_alloc_gib": 9,
            },
        )
        for name in names
        for row in range(3)
    ]
    records.append(record("short", names[0], tier="oom"))
    records.append(record("failed", names[0], 1.0))
    predictions = [
        predicted(row.id, 1.0 + i, memory_bytes=2e10, terms={"compute": 0.7, "bubble": 0.3})
        for i, row in enumerate(records[:-1])
    ]
    predictions.append(predicted("failed", failure="many words " * 30))
    return accuracy(records, predictions, dict.fromkeys(names, 0.12))


def test_the_text_fits_a_terminal(mixed: Accuracy) -> None:
    lines = (accuracy_text(mixed, 5) + targets_text(mixed)).splitlines()
    assert max(map(len, lines)) <= 110
    assert sum(line.endswith("compute") for line in lines) == 5


def test_the_json_is_complete_and_independent_of_the_order(mixed: Accuracy) -> None:
    text = accuracy_json(mixed)
    reversed_rows = [row.record for row in reversed(mixed.rows)]
    left_out = {group.name: group.left_out_error or 0.0 for group in mixed.groups}
    again = accuracy(reversed_rows, [row.prediction for row in mixed.rows], left_out)
    assert accuracy_json(again) == text
    document = json.loads(text)
    assert len(document["rows"]) == len(mixed.rows)
    assert [group["name"] for group in document["groups"]] == sorted({row.record.group for row in mixed.rows})
    failed = next(row for row in document["rows"] if row["id"] == "failed")
    assert (failed["error"], failed["failure"][:4]) == (None, "many")
    assert document["rows"][1]["terms_s"] == {"bubble": 0.3, "compute": 0.7}


def test_tiers_and_groups_are_selected() -> None:
    records = [record(name, group, tier=tier) for name, group, tier in ("axA", "byB", "cxC")]
    records.append(record("o", "x", tier="oom"))

    def ids(*words: tuple[str, ...]) -> str:
        return "".join(row.id for row in select(records, *words))

    assert ids() == "abo"
    assert ids(("A", "C"), ("x",)) == "aco"
    assert ids(("B",), ("y",)) == "b"
    with pytest.raises(AutoparError, match=r"no record in tiers C of y, which has B"):
        select(records, ("C",), ("y",))
    with pytest.raises(AutoparError, match=r"unknown group 'why' \(the file has x, y\)"):
        select(records, groups=("why",))


def test_targets_say_whether_they_are_met() -> None:
    met, missed = (
        targets_text(compared([record("a", "vtrain-single", 1.0)], time_s)) for time_s in (1.1, 1.2)
    )
    assert re.search(r"vtrain-single mean +10.0 % +<= 15.0 % +met", met)
    assert re.search(r"vtrain-single mean +20.0 % +<= 15.0 % +MISSED", missed)
    assert met.count("not measured") == len(TARGETS) - 3


def test_the_page_keeps_what_stands_around_the_markers() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    new = replace_between_markers(page, "new\n")
    assert new == f"before\n{BEGIN}\n```text\nnew\n```\n{END}\nafter\n"
    assert replace_between_markers(new, "new\n") == new
    with pytest.raises(AutoparError, match="needs a line"):
        replace_between_markers("no markers", "new")


def test_the_page_has_the_markers_and_an_example_that_can_be_read(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert replace_between_markers(text, "")
    (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "runs.json"
    path.write_text(example)
    (run,) = read_records(path)
    assert run.step_time_s == pytest.approx(17.8)
    assert run.memory_bytes == pytest.approx(70.5 * 2**30)


def test_the_picture_has_a_mark_for_every_predicted_row(mixed: Accuracy) -> None:
    svg = ElementTree.fromstring(scatter_svg(mixed))
    titles = [each.text or "" for each in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == sum(row.error is not None for row in mixed.rows)
    assert any(title.startswith(mixed.rows[1].record.id) for title in titles)


def test_a_perfect_prediction_stands_on_the_diagonal() -> None:
    svg = scatter_svg(compared([record("a", "g", 0.37)], 0.37))
    across, down = map(float, re.findall(r"translate\(([\d.]+),([\d.]+)\)", svg)[0])
    assert across - 70 == pytest.approx(40 + 640 - down, abs=0.2)


@pytest.fixture
def records_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of two runs, and a predictor that finds each 10 % slower than measured."""
    path = tmp_path / "runs.json"
    path.write_text(json.dumps({"records": [facts("one", "g", 1.0), facts("two", "h", 2.0)]}))

    def predict(records: Iterable[Record], progress: object = None) -> tuple[Prediction, ...]:
        return tuple(predicted(row.id, 1.1 * (row.step_time_s or 0.0)) for row in records)

    stand_in = ModuleType("autopar.records.predict")
    vars(stand_in)["predict"] = predict
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr(autopar.records, "predict", stand_in, raising=False)
    return path


def test_the_command_prints_the_table_or_the_json(
    records_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "out.json"
    assert main(["evaluate", "--records", str(records_file), "-q", "-o", str(saved)]) == 0
    assert re.search(r"^mean of 2 groups +2/2 +10\.0 ", capsys.readouterr().out, re.MULTILINE)
    assert main(["evaluate", "--records", str(records_file), "-q", "--format", "json"]) == 0
    assert capsys.readouterr().out == saved.read_text()
    assert main(["evaluate", "--records", str(records_file), "-q", "-o", str(saved)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["evaluate", "--records", str(records_file), "-q", "--group", "g"]) == 0
    assert "two" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--records", "missing.json"], "missing.json"),
        (["--records", "x", "--tp", "8"], "drop --tp"),
        (["llama3-8b", "--records", "x"], "drop MODEL"),
        (["llama3-8b"], "evaluate needs CLUSTER, --global-batch N; or name a file"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *words]) == 2
    assert message in capsys.readouterr().err
