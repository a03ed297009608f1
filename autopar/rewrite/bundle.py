"""The runtime of one program as one file: of `autopar.runtime` what the files of the program reach.

The runtime is an ordinary package with a module for each idea. A program carries the definitions that it
imports and those that they read, copied as they stand, in the order in which their modules depend on each
other.
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

from autopar.errors import RewriteError
from autopar.rewrite.source_format import format_source

RUNTIME = "autopar_runtime"
"""The name of the module that a program imports."""

PACKAGE = "autopar.runtime"
PATH = Path(__file__).parents[1] / "runtime"


@dataclass(frozen=True)
class Import:
    """`from module import name as alias`; `import module as alias` without a name."""

    module: str
    name: str = ""
    alias: str | None = None

    @property
    def renaming(self) -> str:
        """The end of the statement where the name is not its own."""
        return f" as {self.alias}" if self.alias else ""


@dataclass(frozen=True)
class Definition:
    """A function, class or constant of the runtime: its source, with the blank lines and comments before it
    and the docstring after it, and every name in it."""

    name: str
    source: str
    reads: frozenset[str]


@dataclass(frozen=True)
class Source:
    """A module of the runtime: its docstring, its definitions in order, and what it imports, by name."""

    docstring: str
    definitions: Mapping[str, Definition]
    imports: Mapping[str, Import]

    @staticmethod
    def of(text: str) -> Source:
        """The module with this source."""
        tree = ast.parse(text)
        lines = text.splitlines()
        definitions: dict[str, Definition] = {}
        imports: dict[str, Import] = {}
        end = tree.body[0].end_lineno or 0
        for node, after in zip(tree.body[1:], [*tree.body[2:], None], strict=True):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports |= dict(_imported(node))
            elif name := _defined(node):
                last = after if isinstance(after, ast.Expr) else node
                source = "\n".join(lines[end : last.end_lineno])
                reads = frozenset(each.id for each in ast.walk(node) if isinstance(each, ast.Name))
                definitions[name] = Definition(name, source, reads - {name})
            end = node.end_lineno or 0
        return Source(ast.get_docstring(tree) or "", definitions, imports)


@cache
def runtime_sources() -> Mapping[str, Source]:
    """Every module of the runtime by its full name, each after those it imports from."""
    paths = (path for path in sorted(PATH.glob("*.py")) if path.stem != "__init__")
    sources = {f"{PACKAGE}.{path.stem}": Source.of(path.read_text(encoding="utf-8")) for path in paths}
    needed = {
        name: [each.module for each in source.imports.values() if each.module in sources]
        for name, source in sources.items()
    }
    return {name: sources[name] for name in TopologicalSorter(needed).static_order()}


@cache
def _homes() -> Mapping[str, str]:
    """The module that defines each name."""
    return {name: module for module, source in runtime_sources().items() for name in source.definitions}


def bundle(files: Mapping[str, str]) -> str:
    """The source of `autopar_runtime.py` for a program of these Python files, by name.

    Raises RewriteError where they import something that the runtime does not define.
    """
    homes = _homes()
    wanted: dict[str, None] = {}
    for file, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == RUNTIME:
                for alias in node.names:
                    if alias.name not in homes:
                        raise RewriteError(_unknown(alias.name, file, homes))
                    wanted[alias.name] = None
    return _bundle(frozenset(wanted))


@cache
def _bundle(wanted: frozenset[str]) -> str:
    reached = _reached(wanted)
    sources = {module: source for module, source in runtime_sources().items() if reached.get(module)}
    imports = {
        source.imports[name]
        for module, source in sources.items()
        for definition in reached[module]
        for name in source.definitions[definition].reads
        if name in source.imports and source.imports[name].module not in runtime_sources()
    }
    parts = [
        f'"""What this program needs besides torch: the parts it uses of autopar {version("autopar")}."""',
        "from __future__ import annotations",
        *_import_lines(imports),
    ]
    for module, source in sources.items():
        title = f"# --- {module.rpartition('.')[2]} "
        comment = [f"# {line}".rstrip() for line in source.docstring.splitlines()]
        parts.append("\n".join(["", title.ljust(110, "-"), *comment, ""]))
        parts += [each.source for name, each in source.definitions.items() if name in reached[module]]
    return format_source("\n".join(parts))


def _reached(wanted: Iterable[str]) -> dict[str, set[str]]:
    """By module, the definitions that these public names need."""
    sources, homes = runtime_sources(), _homes()
    reached: dict[str, set[str]] = {}
    left = [(homes[name], name) for name in wanted]
    while left:
        module, name = left.pop()
        if name in reached.setdefault(module, set()):
            continue
        reached[module].add(name)
        source = sources[module]
        for read in source.definitions[name].reads:
            if read in source.definitions:
                left.append((module, read))
            elif read in source.imports and source.imports[read].module in sources:
                left.append((source.imports[read].module, read))
    return reached


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Import]]:
    """What a statement imports, by the name that it gets."""
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            yield alias.asname or alias.name, Import(node.module or "", alias.name, alias.asname)
        else:
            yield alias.asname or alias.name.partition(".")[0], Import(alias.name, alias=alias.asname)


def _defined(node: ast.stmt) -> str:
    """The name that a statement defines; empty where it defines none."""
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
            return name
    return ""


def _import_lines(imports: Iterable[Import]) -> Iterator[str]:
    """Import statements, sorted as isort does: the standard library, then torch."""
    for is_standard in (True, False):
        yield ""
        mine = [each for each in imports if _is_standard(each.module) == is_standard]
        yield from sorted(f"import {each.module}{each.renaming}" for each in mine if not each.name)
        for module in sorted({each.module for each in mine if each.name}):
            names = [each for each in mine if each.module == module and each.name]
            plain = sorted((each.name for each in names if not each.alias), key=_kind_and_name)
            yield from [f"from {module} import {', '.join(plain)}"] if plain else []
            yield from sorted(
                f"from {module} import {each.name}{each.renaming}" for each in names if each.alias
            )


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _kind_and_name(name: str) -> tuple[int, str]:
    """Constants first, then classes, then all else."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2), name


def _unknown(name: str, file: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{file} imports {name!r}, which the runtime does not define{hint}"
