"""The runtime of a program in one file: all of what the program reaches, and nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from autopar.errors import RewriteError
from autopar.rewrite.bundle import RUNTIME, bundle, runtime_sources
from tests.autopar.emitted_forms import FORMS, program

IMPORTS = """
import sys
sys.modules.update(dict.fromkeys(["autopar", "costmodel", "graphs", "hardware_db", "numpy", "pydantic"]))
for directory in sys.argv[1:]:
    sys.path.insert(0, directory)
    import model, train, parity, autopar_runtime
    assert all(module.__file__.startswith(directory) for module in (model, train, parity, autopar_runtime))
    for name in ("model", "train", "parity", "autopar_runtime"):
        del sys.modules[name]
"""


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """What a module defines, by name."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] = node
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                found[name] = node
    return found


def names_in(node: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def imported(tree: ast.Module) -> set[str]:
    nodes = (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == RUNTIME)
    return {alias.name for node in nodes for alias in node.names}


def test_every_form_runs_with_torch_alone(tmp_path: Path) -> None:
    directories = [str(program(form).save(tmp_path / form.replace(" ", "-"))) for form in FORMS]
    command = [sys.executable, "-c", IMPORTS, *directories]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", FORMS)
def test_nothing_lies_in_it_that_the_program_does_not_reach(form: str) -> None:
    files = program(form).files
    tree = ast.parse(files[f"{RUNTIME}.py"])
    found = definitions(tree)
    reached: set[str] = set()
    left = {
        name for file in ("model.py", "train.py", "parity.py") for name in imported(ast.parse(files[file]))
    }
    while left:
        reached |= left
        left = {name for each in left for name in names_in(found[each]) if name in found} - reached
    assert found.keys() == reached
    statements = (ast.Import, ast.ImportFrom, ast.Expr)  # docstrings are expressions
    assert len(found) == sum(not isinstance(node, statements) for node in tree.body)


def test_a_form_carries_no_other_forms_runtime() -> None:
    only = {
        "def shard_parameters": {"dp2 tp2 zero3", "ep2 zero3", "offload"},
        "PipelineStage": {"pp2", "pp2 dp2 tp2"},
        "def leave_weights": {"pp2 dp2 tp2"},
        "def to_experts": {"ep2", "ep2 zero3"},
        "class BatchNorm": {"batch norm"},
        "class HostAdamW": {"offload"},
        "def causal_attention": {"cp2"},
        "class GradientBuckets": {"dp2", "pp2 dp2 tp2", "cp2", "ep2", "batch norm"},
    }
    runtimes = {form: program(form).files[f"{RUNTIME}.py"] for form in FORMS}
    assert {text: {form for form in FORMS if text in runtimes[form]} for text in only} == only
    whole = bundle({"all.py": f"from {RUNTIME} import {', '.join(public_names())}"})
    assert max(map(len, runtimes.values())) < 0.8 * len(whole)
    assert len(runtimes["dp2"]) < 0.6 * len(whole)


def public_names() -> list[str]:
    sources = runtime_sources().values()
    return [name for source in sources for name in source.definitions if not name.startswith("_")]


def test_definitions_of_the_runtime_have_one_name_each() -> None:
    """In one file they share a namespace, with one another and with what is imported."""
    sources = runtime_sources()
    counts = Counter(name for source in sources.values() for name in source.definitions)
    assert not [name for name, count in counts.items() if count > 1]
    external = {
        name: each
        for source in sources.values()
        for name, each in source.imports.items()
        if each.module not in sources
    }
    assert external.keys().isdisjoint(counts)
    for source in sources.values():
        for name, each in source.imports.items():
            assert each == external.get(name, each), f"{name} is imported from two places"
            assert each.module not in sources or (each.name == name), f"{name} is renamed"


def test_every_statement_of_the_runtime_belongs_to_a_definition() -> None:
    """So that none is left behind."""
    for name, source in runtime_sources().items():
        path = Path(__file__).parents[2] / f"{name.replace('.', '/')}.py"
        body = ast.parse(path.read_text()).body
        told = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)]
        assert len(told) == len(source.definitions), name


def test_the_same_files_give_the_same_bytes() -> None:
    text = f"from {RUNTIME} import all_gather, batches\n"
    other = f"from {RUNTIME} import batches\nfrom {RUNTIME} import all_gather\n"
    assert bundle({"model.py": text}) == bundle({"train.py": other})


def test_a_name_that_the_runtime_does_not_have_is_told() -> None:
    with pytest.raises(RewriteError, match=r"model.py imports 'all_gathr', .* did you mean 'all_gather'"):
        bundle({"model.py": f"from {RUNTIME} import all_gathr\n"})
