"""The accuracy of predictions as JSON: every figure and every row, under names with their units."""

from __future__ import annotations

import json
from dataclasses import asdict

from autopar.records.metrics import Accuracy, Row

__all__ = ["accuracy_json"]


def accuracy_json(accuracy: Accuracy) -> str:
    """The same for the same predictions, byte for byte: groups sorted by name, rows by group and id."""
    document = {
        "constant_utilisation": accuracy.constant_utilisation,
        "overall": asdict(accuracy.overall),
        "groups": [asdict(group) for group in accuracy.groups],
        "rows": [_row(row) for row in accuracy.rows],
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _row(row: Row) -> dict[str, object]:
    record, prediction = row.record, row.prediction
    return {
        "id": record.id,
        "group": record.group,
        "tier": record.tier,
        "measured_step_time_s": record.step_time_s,
        "measured_tokens_per_s_per_device": record.tokens_per_s_per_device,
        "measured_memory_bytes": record.memory_bytes,
        "out_of_memory": record.out_of_memory,
        "step_time_s": prediction.step_time_s,
        "memory_bytes": prediction.memory_bytes,
        "fits": prediction.fits,
        "error": row.error,
        "memory_error": row.memory_error,
        "failure": row.failure,
        "chosen": prediction.chosen,
        "terms_s": dict(sorted(prediction.terms.items())),
    }
