"""What blocks of an emitted program run again: exactly the ops whose results the plan does not keep."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import autopar
import hardware_db
from autopar.errors import RewriteError
from autopar.kernels import CONJUGATES
from autopar.op_kinds import is_conversion, short_name
from autopar.plan import Parallelism, Plan, Recomputation
from autopar.request import training_policy
from autopar.rewrite.local import local_program
from autopar.rewrite.program import rewrite
from autopar.rewrite.recompute import recomputing
from autopar.search.describe import recomputation
from autopar.search.evaluate import Evaluator
from autopar.search.given import GivenPrograms
from autopar.search.shallow import Shallow
from graphs import Capture, OpGraph, capture
from graphs.ir import Op
from tests.autopar.random_plans import plan_of, with_mixed_recomputation
from tests.autopar.test_saved import llama as wide_llama
from tests.models import case

BLOCK, OTHER = "model.layers.0", "model.layers.1"
DEGREES = {
    "whole": Parallelism(microbatch_size=2, num_microbatches=2),
    "tp2 sp": Parallelism(tp=2, microbatch_size=2, num_microbatches=2, sequence_parallel=True),
    "tp2 no-sp": Parallelism(tp=2, microbatch_size=2, num_microbatches=2, sequence_parallel=False),
}
MATRIX_OPS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product", "_c10d_functional::a",
              "_c10d_functional::r")  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts products, attention and collectives by name and shapes of what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[object, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith(MATRIX_OPS) and "backward" not in name:
            shapes = tuple(tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor))
            self.counts[name.partition(".")[0], shapes] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two whose collectives move nothing: enough to count them."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def llama() -> Capture:
    torch.manual_seed(0)
    return capture(case("llama").build(), case("llama").inputs, name="llama")


def with_recomputation(plan: Plan, *entries: Recomputation) -> Plan:
    mixed = plan.parallelism.model_copy(update={"recompute": "mixed"})
    return plan.model_copy(update={"parallelism": mixed, "recomputation": entries})


def counted(plan: Plan, model: Capture, directory: Path) -> Counter[tuple[object, ...]]:
    """The ops of a step with two microbatches, both forwards before both backwards, as in a pipeline."""
    rewrite(model, plan).save(directory)
    stage = imported(directory).STAGES[0]
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    with torch.device("cpu"):
        module = stage(mesh)
    batch = case("llama").inputs(2)
    with Counting() as mode:
        losses = [module(**batch) for _ in range(2)]
        for loss in losses:
            loss.backward()
    return mode.counts


def imported(directory: Path) -> ModuleType:
    """`model.py` of a saved program."""
    for name in ("model", "autopar_runtime"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(directory))
    try:
        return importlib.import_module("model")
    finally:
        sys.path.remove(str(directory))
        for name in ("model", "autopar_runtime"):
            sys.modules.pop(name, None)


def matrix_ops(graph: OpGraph, block: str) -> list[Op]:
    """The products, attention and collectives of a block, in order."""
    inside = [op for op in graph.ops if f"{op.module}.".startswith(f"{block}.")]
    return [
        op
        for op in inside
        if short_name(op) in ("linear", "scaled_dot_product_attention")
        or (is_conversion(op) and CONJUGATES[short_name(op)][0])
    ]


def signature(op: Op, graph: OpGraph) -> tuple[object, ...]:
    """How an op is counted: by name and the shapes of what it reads."""
    shapes = [graph.tensors[name].shape for name in op.inputs]
    if short_name(op) == "linear":
        rows = graph.tensors[op.output].num_elements // shapes[1][0]
        return "aten::mm", ((rows, shapes[1][1]), (shapes[1][1], shapes[1][0]))
    if short_name(op) == "scaled_dot_product_attention":
        return ("attention",)
    return ("collective", short_name(op).removesuffix("_partial").removesuffix("_replicated"))


def summed(counts: Counter[tuple[object, ...]]) -> Counter[tuple[object, ...]]:
    """Counts with attention by kind alone, and collectives by name."""
    found: Counter[tuple[object, ...]] = Counter()
    for (name, shapes), count in counts.items():
        if "scaled_dot" in str(name):
            found["attention",] += count
        elif str(name).startswith("_c10d"):
            kind = str(name).removeprefix("_c10d_functional::")
            kind = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}.get(
                kind.removesuffix("_out"), kind
            )
            found["collective", kind] += count
        else:
            found[name, shapes] += count
    return found


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("every", [2, 3])
def test_exactly_what_is_not_kept_runs_again(
    degrees: str, every: int, two_ranks: None, tmp_path: Path
) -> None:
    """One block keeps every second or third result, the other computes all again, with two microbatches in
    flight; torch stops before the block's last product."""
    model, p = llama(), DEGREES[degrees]
    plan = autopar.evaluate(model, f"local-cpu*{p.world_size}", parallelism=p)
    graph = local_program(model, plan).graph
    ops = {path: matrix_ops(graph, path) for path in (BLOCK, OTHER)}
    kept = {op.name for op in ops[BLOCK][::every]}
    mixed = with_recomputation(
        plan,
        Recomputation(blocks=(BLOCK,), mode="kept", kept=tuple(kept), labels=tuple(kept)),
        Recomputation(blocks=(OTHER,), mode="full"),
    )
    base = summed(counted(plan, model, tmp_path / "all"))
    found = summed(counted(mixed, model, tmp_path / "mixed"))
    again = [op for path in ops for op in ops[path] if op.name not in kept and not is_last(op, ops[path])]
    expected = Counter(signature(op, graph) for op in again for _ in range(p.num_microbatches))
    assert found - base == expected
    assert not base - found


def is_last(op: Op, ops: list[Op]) -> bool:
    """Whether no backward of the block reads the op: its last product, and the sum of that over ranks."""
    last = max(index for index, each in enumerate(ops) if short_name(each) == "linear")
    return ops.index(op) >= last


def test_a_plan_lists_together_what_blocks_do_alike() -> None:
    model, p = wide_llama(), Parallelism(microbatch_size=4)
    evaluator = Evaluator(hardware_db.cluster("dgx-a100"), training_policy(model.graph))
    chain = evaluator.priced(GivenPrograms(Shallow(model, {})).chain(p, evaluator.era), p)
    blocks = iter(["keep-1", "full", "keep-1"])
    choices = [next(blocks) if unit.is_block else "none" for unit in chain.units]
    kept, full = recomputation(model.graph, evaluator.evaluate(chain, p, (0,), choices))
    assert (kept.mode, kept.blocks) == ("kept", ("model.layers.0", "model.layers.2"))
    assert (full.mode, full.blocks, full.kept) == ("full", ("model.layers.1",), ())
    modules = {op.name: op.module for op in model.graph.ops}
    assert {modules[name].startswith("model.layers.0.") for name in kept.kept} == {True}
    products = {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up")}
    assert {label.rpartition(".")[2] for label in kept.labels} <= {*products, "attention"}
    assert "attention" in kept.labels
    uniform = recomputation(
        model.graph, evaluator.evaluate(chain, p.model_copy(update={"recompute": "full"}), (0,))
    )
    assert [(each.mode, len(each.blocks)) for each in uniform] == [("full", 3)]


def test_explain_says_what_blocks_compute_again(plan: Plan) -> None:
    full, kept = (tuple(f"model.layers.{i}" for i in each) for each in (range(12), range(12, 32)))
    labels = ("self_attn.o_proj", "attention")
    explained = with_recomputation(
        plan,
        Recomputation(blocks=full, mode="full"),
        Recomputation(blocks=kept, mode="kept", kept=("linear_87", "sdpa_12"), labels=labels),
    ).explain()
    assert re.search(r"model\.layers\.0-11 +all\n", explained)
    assert re.search(r"model\.layers\.12-31 +all but self_attn\.o_proj, attention\n", explained)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_mixed_programs_pass_a_linter(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = capture(case(name).build(), case(name).inputs, name=name)
    plan = plan_of(model.graph, Parallelism(pp=2, microbatch_size=2, num_microbatches=2), {})
    program = rewrite(model, with_mixed_recomputation(model, plan, seed=0))
    assert "KEEP_1 = keep(" in program.source
    assert 'KEPT.get(f"' in program.source
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--line-length", "110"]
    command += ["--select", "E,F,I,UP,B", "."]
    checked = subprocess.run(
        command, cwd=program.save(tmp_path / "program"), capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_runs_of_blocks_stand_in_the_table_as_ranges() -> None:
    paths = [f"layers.{number}" for number in range(8)]
    entries = [
        Recomputation(blocks=(*paths[:3], paths[4]), mode="full"),
        Recomputation(blocks=tuple(paths[5:7]), mode="selective"),
    ]
    graph = llama().graph
    lines = "\n".join(recomputing(entries, graph, frozenset(paths)).table)
    table = eval(lines.partition("KEPT = ")[2], {"keep_nothing": "full", "keep_matmuls": "selective"})
    assert table == {path: each.mode for each in entries for path in each.blocks}
    assert 'f"layers.{i}" for i in range(0, 3)' in lines


def test_a_plan_of_an_older_version_says_so(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json().replace('"version": 4', '"version": 3'))
    with pytest.raises(ValueError, match=r"the plan is of version 3, this autopar reads 4; plan the model"):
        Plan.load(path)


def test_an_op_that_the_model_lacks_is_named() -> None:
    model = llama()
    plan = autopar.evaluate(model, "local-cpu", parallelism=Parallelism(microbatch_size=2))
    wrong = Recomputation(blocks=(BLOCK,), mode="kept", kept=("linear_99",))
    with pytest.raises(RewriteError, match=r"keeps the results of linear_99 in model\.layers\.0"):
        rewrite(model, with_recomputation(plan, wrong))
