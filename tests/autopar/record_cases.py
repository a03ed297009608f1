"""Some published records, one of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autopar.records.schema import Record, read_records

EXCERPT = Path(__file__).parent / "data" / "records.json"
RECORDS = {record.id: record for record in read_records(EXCERPT)}
every_record = pytest.mark.parametrize("record", RECORDS.values(), ids=lambda record: record.id)


def of_group(group: str) -> Record:
    """The first record of a group."""
    return next(record for record in RECORDS.values() if record.group == group)


def changed(record: Record, **parts: dict[str, Any]) -> Record:
    """A record with other fields in its model, cluster, parallelism or batch."""
    return record.model_copy(
        update={name: getattr(record, name).model_copy(update=fields) for name, fields in parts.items()}
    )
