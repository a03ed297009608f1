"""A fact: a number with the place it was read and how far to trust it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hardware_db.errors import MissingFactError

Confidence = Literal["read", "derived", "recalled", "assumed", "fitted", "user"]
"""How a value came to be known.

`read`: it stands in the source. `derived`: arithmetic on such a value. `recalled`: not checked against a
document. `assumed`: nobody published it and the planner needs a number. `fitted`: chosen so that the cost
model reproduces published training runs. `user`: from a cluster file.
"""


class Record(BaseModel):
    """Base of everything stored: immutable, and a misspelt key is an error rather than ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(Record):
    """A document that facts cite: its title, where it is, and the revision that was read."""

    title: str
    locator: str | None = None
    commit: str | None = None


class _Sourced(Record):
    source: str | None = None
    confidence: Confidence | None = None
    note: str | None = None


class Fact(_Sourced):
    """A non-negative number in the unit that its key names; a `value` of None means that it is not known."""

    value: Annotated[float, Field(ge=0)] | None

    @model_validator(mode="after")
    def _known_values_are_sourced(self) -> Self:
        present = (self.value is not None, self.source is not None, self.confidence is not None)
        if len(set(present)) > 1:
            raise ValueError("a fact has a value, a source and a confidence, or none of the three")
        return self

    def require(self, what: str) -> float:
        """The value; raises MissingFactError, naming `what`, when it is unknown."""
        if self.value is None:
            because = f" ({self.note})" if self.note else ""
            raise MissingFactError(
                f"{what} is unknown{because}; give the number in a cluster file of your own"
            )
        return self.value

    def scaled(self, factor: float, note: str) -> Fact:
        """This fact times `factor`, marked as derived; an unknown stays unknown."""
        if self.value is None:
            return self
        return Fact(value=self.value * factor, source=self.source, confidence="derived", note=note)


class Dimensions(_Sourced):
    """The side lengths of a torus, in cards."""

    value: tuple[Annotated[int, Field(ge=1)], ...]
    source: str
    confidence: Confidence


UNKNOWN = Fact(value=None)


def facts_of(record: BaseModel, prefix: str = "") -> Iterator[tuple[str, Fact | Dimensions]]:
    """Every fact inside a record with its dotted path, in the order of the schema."""
    for name in type(record).model_fields:
        yield from _facts_in(getattr(record, name), f"{prefix}{name}")


def _facts_in(value: object, path: str) -> Iterator[tuple[str, Fact | Dimensions]]:
    if isinstance(value, Fact | Dimensions):
        yield path, value
    elif isinstance(value, BaseModel):
        yield from facts_of(value, f"{path}.")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _facts_in(item, f"{path}.{key}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _facts_in(item, f"{path}[{index}]")
