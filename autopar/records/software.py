"""Which era of training software a record ran under (`costmodel.software` says what each era does).

A record's own `era` wins. Else the first rule of `autopar/data/software_rules.json` that holds: words in the
record's `software` and notes, then general signs such as the kind of device and the precision.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from autopar.plan import Recompute
from autopar.records.clusters import accelerator_of
from autopar.records.schema import Record, RecordError
from costmodel import software_eras
from hardware_db.errors import did_you_mean


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Habits(_Data):
    """What was usual in an era: GPT's dropout, and what a record means by recomputing selectively."""

    gpt_dropout: Annotated[float, Field(ge=0, lt=1)]
    selective_recompute: Recompute


class _Rule(_Data):
    """Conditions that must all hold; one that is left out always does. `since` is as `date_of` tells."""

    era: str
    words: str | None = None
    since: float | None = None
    kind: str | None = None
    precisions: tuple[str, ...] | None = None
    has_fp8: bool | None = None
    fsdp: bool | None = None

    def holds(self, record: Record) -> bool:
        card = accelerator_of(record)
        text = f"{record.software or ''} {record.notes}"
        return (
            (self.words is None or re.search(self.words, text, re.IGNORECASE) is not None)
            and (self.since is None or date_of(record) >= self.since)
            and (self.kind is None or card.kind == self.kind)
            and (self.precisions is None or record.precision in self.precisions)
            and (self.has_fp8 is None or ("fp8" in card.peak_dense_flops_per_s) == self.has_fp8)
            and (self.fsdp is None or record.parallelism.fsdp == self.fsdp)
        )


class _Table(_Data):
    habits: dict[str, Habits]
    rules: tuple[_Rule, ...]


def software_era(record: Record) -> str:
    """The name of the era, one of `costmodel.software_eras()`.

    Raises `RecordError` for a record whose `era` is none of them.
    """
    if record.era is None:
        return next(rule.era for rule in _table().rules if rule.holds(record))
    known = software_eras()
    if record.era not in known:
        raise RecordError(
            f"record {record.id}: era {record.era!r} is unknown, expected one of {', '.join(known)}"
            f"{did_you_mean(record.era, known)}"
        )
    return record.era


_DATED: Final = re.compile(r"arXiv:(\d{4})\.\d+|\((\d\d\.\d\d)(?:\.\d+)? container\)")


def date_of(record: Record) -> float:
    """Year and month of the software, such as 22.05, by the paper (arXiv number) or the container (NVIDIA's
    year.month tags) that the source names; 0 where it names neither."""
    match = _DATED.search(record.source)
    if match is None:
        return 0.0
    return float(match[1]) / 100 if match[1] else float(match[2])


def habits(era: str) -> Habits:
    """What was usual in an era."""
    return _table().habits[era]


@cache
def _table() -> _Table:
    text = (resources.files("autopar") / "data" / "software_rules.json").read_text(encoding="utf-8")
    return _Table.model_validate(json.loads(text))
