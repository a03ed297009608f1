"""Which repetitions of a sequence are taken."""

from __future__ import annotations

import pytest

from graphs.periods import periodic


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("aaaaaaa", ["a" * 7]),
        ("aaaa", []),
        ("xabababababay", ["ab" * 5]),
        ("aaaaab" * 5 + "aa", ["aaaaab" * 5]),
        ("aaaaab" * 4 + "aa", ["a" * 5] * 4),
        ("ab" * 5 + "c" * 6, ["ab" * 5, "c" * 6]),
        ("abcdefghi" * 6, []),
    ],
)
def test_the_period_that_leaves_out_most_wins(letters: str, expected: list[str]) -> None:
    def number_of(start: int, period: int) -> int:
        first, number = letters[start : start + period], 0
        while letters[start + number * period :].startswith(first) and len(first) == period:
            number += 1
        return number

    found = [letters[each.start : each.stop] for each in periodic(len(letters), number_of)]
    assert found == expected
