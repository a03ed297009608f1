"""Saved plans: read back, with errors that say what is wrong with the file."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from autopar.errors import AutoparError
from autopar.plan import PLAN_VERSION, Plan


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises AutoparError when it is none, OSError when it cannot be read."""
    content = _load(path)
    if not _is_plan(content):
        raise AutoparError(f"{path} is no plan: `autopar plan ... -o {path}` writes one")
    assert isinstance(content, dict)
    if content.get("version") != PLAN_VERSION:
        found = content.get("version")
        raise AutoparError(
            f"{path} is a plan of version {found}, this autopar reads {PLAN_VERSION}; make it again"
        )
    try:
        return Plan.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise AutoparError(f"{path}: {field}: {first['msg']}, got {str(first['input'])[:80]!r}") from None


def is_plan_file(path: Path) -> bool:
    """Whether it is a file that holds a plan rather than, say, a cluster."""
    if path.suffix != ".json" or not path.is_file():
        return False
    return _is_plan(_load(path))


def _is_plan(content: object) -> bool:
    return isinstance(content, dict) and "parallelism" in content


def _load(path: Path) -> object:
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AutoparError(f"{path} is no JSON: {error}") from None
    return content
