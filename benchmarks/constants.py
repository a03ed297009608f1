"""The constants that are fitted: where they stand, what to believe of them before, how they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from costmodel import software
from hardware_db import Accelerator, catalog
from hardware_db.schema import Kind

HERE = Path(__file__).parent
SOFTWARE = HERE.parent / "costmodel" / "data" / "software.json"
EFFICIENCY = HERE.parent / "hardware_db" / "data" / "efficiency.json"
ACCELERATORS = HERE.parent / "hardware_db" / "data" / "accelerators"

SOURCE = "fit"
"""The key under which the data files cite this fit."""

SHARES = ("matmul", "matmul_fp8", "attention", "attention_native", "memory", "wave_loss")


@dataclass(frozen=True)
class Constant:
    """One constant.

    `place` is `software.shared`, `software.ERA`, `kind.KIND` of devices, or `family.NAME` of the accelerators
    `members`. `prior` is what to believe without any run, `spread` by how much in logarithms.
    """

    place: str
    name: str
    prior: float
    spread: float
    members: tuple[str, ...] = ()

    def within_bounds(self, value: float) -> float:
        """The value, at most 1 for a share, at least 1 for the roofline's edge."""
        if self.name in SHARES or "overlap" in self.name:
            return min(value, 1.0)
        return max(value, 1.0) if self.name == "edge_sharpness" else value

    def applies_to(self, card: Accelerator, *, own: bool) -> bool:
        """Whether it is one of the accelerator's kind, or of its family (`own`)."""
        return card.id in self.members if own else self.place == f"kind.{card.kind}"

    @property
    def value(self) -> float:
        """What the data files say now."""
        scope, _, name = self.place.partition(".")
        if scope == "software":
            return float(getattr(software("flash-2023" if name == "shared" else name), self.name))
        if scope == "kind":
            fact = getattr(catalog.efficiency_defaults().of(cast("Kind", name), ""), self.name)
        else:
            fact = getattr(catalog.accelerator(self.members[0]).efficiency_facts, self.name)
        return float(fact.require(f"{self.place}.{self.name}"))


def constants() -> tuple[Constant, ...]:
    """All of `constants.json`."""
    document = json.loads((HERE / "constants.json").read_text(encoding="utf-8"))
    families: Mapping[str, list[str]] = document["families"]
    return tuple(
        Constant(members=tuple(families.get(entry["place"].removeprefix("family."), ())), **entry)
        for entry in document["constants"]
    )


def write_constants(values: Mapping[Constant, float]) -> None:
    """Write fitted values into the data files, a line each; all else stays as it is."""
    for constant, value in values.items():
        value = constant.within_bounds(value)
        scope, _, name = constant.place.partition(".")
        if scope == "software":
            _write(SOFTWARE, name, constant, value)
        elif scope == "kind":
            _write(EFFICIENCY, name, constant, value)
        else:
            for member in constant.members:
                _write(ACCELERATORS / f"{member}.json", "efficiency_facts", constant, value)


def _write(path: Path, block: str, constant: Constant, value: float) -> None:
    """Replace or add the line of one constant inside the object named `block`."""
    fact: dict[str, object] = {"value": float(f"{value:.4g}"), "source": SOURCE, "confidence": "fitted"}
    text = path.read_text(encoding="utf-8")
    text = text.replace(f'  "{block}": {{}},', f'  "{block}": {{\n  }},')
    if f'"{block}": {{\n' not in text:
        text = text.replace('  "notes":', f'  "{block}": {{\n  }},\n  "notes":')
    opening = re.search(rf'^( *)"{re.escape(block)}": \{{\n', text, re.MULTILINE)
    if opening is None:
        raise SystemExit(f"{path} has no object {block!r}; add it, then fit again")
    end = text.index(f"\n{opening[1]}}}", opening.end() - 1)
    body, indent = text[opening.end() : end], f"{opening[1]}  "
    line = f'{indent}"{constant.name}": {json.dumps(fact)}'
    old = re.search(rf'^ *"{constant.name}": \{{[^\n]*?\}}(?=,?$)', body, re.MULTILINE)
    others = f",\n{body}" if body else ""
    body = body[: old.start()] + line + body[old.end() :] if old else line + others
    path.write_text(text[: opening.end()] + body + text[end:], encoding="utf-8")
