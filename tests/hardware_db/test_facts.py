"""Facts: a number never travels without its source, and records refuse what they do not know."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from hardware_db.errors import MissingFactError
from hardware_db.facts import UNKNOWN, Fact, Source


@pytest.mark.parametrize(
    "fields",
    [
        {"value": 1.0},
        {"value": 1.0, "source": "somewhere"},
        {"value": 1.0, "confidence": "read"},
        {"value": None, "source": "somewhere", "confidence": "read"},
        {"value": -1.0, "source": "somewhere", "confidence": "read"},
        {"value": float("nan"), "source": "somewhere", "confidence": "read"},
        {"value": 1.0, "source": "somewhere", "confidence": "certain"},
        {"value": 1.0, "source": "somewhere", "confidence": "read", "unit": "s"},
    ],
)
def test_a_fact_without_its_source_or_with_unknown_fields_is_rejected(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Fact.model_validate(fields)


def test_facts_are_immutable() -> None:
    fact = Fact(value=1.0, source="somewhere", confidence="read")
    with pytest.raises(ValidationError):
        setattr(fact, "value", 2.0)  # noqa: B010  # a plain assignment is what type checkers refuse


def test_an_unknown_fact_says_what_is_missing_and_why() -> None:
    with pytest.raises(MissingFactError, match=r"x1: memory is unknown \(under embargo\)"):
        Fact(value=None, note="under embargo").require("x1: memory")


def test_a_scaled_fact_keeps_its_source_and_is_derived() -> None:
    half = Fact(value=8.0, source="somewhere", confidence="read").scaled(0.5, "half of it")
    assert (half.value, half.source, half.confidence, half.note) == (
        4.0,
        "somewhere",
        "derived",
        "half of it",
    )
    assert UNKNOWN.scaled(0.5, "half of it") is UNKNOWN


def test_a_source_has_a_title() -> None:
    with pytest.raises(ValidationError):
        Source.model_validate({"locator": "https://example.com"})
