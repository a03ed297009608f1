"""The documentation is true: its Python runs, its commands parse, its YAML loads, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import hardware_db
from autopar.cli.parser import build_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ | {4})(autopar .*)$", re.MULTILINE)
SOURCE_FILE = re.compile(r"`((?:autopar|costmodel|graphs|hardware_db|tests|benchmarks|examples)/[\w/.]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(language: str) -> list[tuple[Path, str]]:
    return [
        (page, code) for page in PAGES for kind, code in FENCE.findall(page.read_text()) if kind == language
    ]


@pytest.mark.parametrize(
    ("page", "code"), fenced("python"), ids=lambda value: name(value) if isinstance(value, Path) else ""
)
def test_python_in_the_documentation_runs(
    page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_the_documentation_parse(page: Path) -> None:
    for command in COMMAND.findall(page.read_text()):
        words = shlex.split(command.split(" | ")[0].split(" > ")[0], comments=True)
        build_parser().parse_args(words[1:])


@pytest.mark.parametrize(
    ("page", "text"), fenced("yaml"), ids=lambda value: name(value) if isinstance(value, Path) else ""
)
def test_cluster_files_in_the_documentation_load(page: Path, text: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    assert hardware_db.cluster(path).num_devices == 64


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_the_documentation_names_exist(page: Path) -> None:
    text = page.read_text()
    missing = [path for path in SOURCE_FILE.findall(text) if not (ROOT / path).exists()]
    missing += [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not missing
