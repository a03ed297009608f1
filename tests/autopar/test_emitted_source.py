"""Emitted source as a reviewer reads it: typed, no longer than the original calls for, nothing unused."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autopar.plan import Parallelism
from autopar.rewrite.bundle import RUNTIME
from autopar.rewrite.program import rewrite
from graphs import capture
from tests.autopar.emitted_forms import FORMS, program
from tests.autopar.random_plans import random_plan
from tests.models import case

ROOT = Path(__file__).parents[2]
FILES = ("model", "train", "parity", RUNTIME)


@pytest.mark.slow
def test_every_file_is_strictly_typed(tmp_path: Path) -> None:
    """All forms at once, each under names of its own."""
    for number, form in enumerate(FORMS):
        for name in FILES:
            text = program(form).files[f"{name}.py"]
            renamed = re.sub(
                rf"^from ({'|'.join(FILES)}) import", rf"from \1_{number} import", text, flags=re.M
            )
            (tmp_path / f"{name}_{number}.py").write_text(renamed)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        "",
        "--untyped-calls-exclude",
        "torch",
    ]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "emitted"), "."]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert f"no issues found in {len(FORMS) * len(FILES)} source files" in checked.stdout


def unused(text: str) -> list[str]:
    """Names that a module defines, imports or assigns and never reads, and attributes that nothing reads."""
    tree = ast.parse(text)
    public = {"STAGES", "BORDERS", "PLACEMENTS", "PARTIAL_GRADIENTS", "annotations"}
    nodes = list(ast.walk(tree))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    bound |= {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if "." not in alias.name
    }
    stages = {
        name.id
        for node in tree.body
        if _makes_stages(node)
        for name in ast.walk(node)
        if isinstance(name, ast.Name)
    }
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            alike = {"self", "mesh", "batch"} if node.name in stages else {"self"}  # stages are called alike
            bound |= {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)} - alike
    attributes = {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    stored = {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    annotated = {
        node.target.id
        for node in nodes
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return sorted((bound - read - public - (annotated & attributes)) | (stored - attributes))


def _makes_stages(node: ast.stmt) -> bool:
    """Whether a statement is the table of stages."""
    match node:
        case ast.Assign(targets=[ast.Name(id="STAGES")]) | ast.AnnAssign(target=ast.Name(id="STAGES")):
            return True
    return False


@pytest.mark.parametrize("form", FORMS)
def test_everything_in_a_model_is_used(form: str) -> None:
    assert unused(program(form).source) == []


def test_what_is_unused_is_noticed() -> None:
    text = (
        "import os\nclass A:\n    def f(self, x, y):\n        self.z = 1\n        t = 2\n        return x\n"
    )
    assert unused(text) == ["A", "os", "t", "y", "z"]


@pytest.mark.parametrize("form", FORMS)
def test_no_rank_is_written_down(form: str) -> None:
    """Every rank runs the same source; which one it is, it asks the mesh."""
    for name in ("model.py", "train.py"):
        assert not re.search(
            r"\brank(\(\)|) == \d|get_rank\(\)|local_rank\b(?!\()", program(form).files[name]
        )


class Container(torch.nn.Module):
    """A model with the name of a class of the runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.fc(x).square().mean()
        return loss


def test_classes_have_other_names_than_those_of_the_runtime() -> None:
    found = capture(Container(), lambda batch: {"x": torch.randn(batch, 4)})
    source = rewrite(found, random_plan(found, Parallelism(microbatch_size=2), seed=0)).source
    assert "class Container2(nn.Module):" in source


def original_lines(model: torch.nn.Module) -> int:
    """Lines of source of the model's own classes: not those of torch."""
    kinds = {type(module) for module in model.modules()}
    own = [kind for kind in kinds if not kind.__module__.startswith("torch.")]
    return sum(len(inspect.getsourcelines(kind)[0]) for kind in own)


def class_lines(text: str) -> int:
    """Lines of the classes of an emitted model: what remains without imports and tables."""
    classes = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    return sum((node.end_lineno or 0) - node.lineno + 1 for node in classes)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_at_most_twice_as_long_as_its_original(form: str) -> None:
    original = original_lines(case(FORMS[form][0]).build())
    assert class_lines(program(form).source) <= 2 * original
