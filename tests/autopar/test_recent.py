"""What was asked for last is kept."""

from __future__ import annotations

from autopar.search.recent import Recent


class Counted:
    """Notes what it made something of; the same numbers twice are still two lists."""

    def __init__(self, most: int) -> None:
        self.made: list[list[int]] = []
        self.recent = Recent(self._make, most)

    def _make(self, given: list[int]) -> int:
        self.made.append(given)
        return sum(given)


def test_it_is_made_once_of_each_object_though_others_are_equal() -> None:
    counted, one, other = Counted(2), [1, 2], [1, 2]
    assert [counted.recent.of(each) for each in (one, other, one, other)] == [3, 3, 3, 3]
    assert [id(each) for each in counted.made] == [id(one), id(other)]


def test_what_was_asked_for_longest_ago_is_forgotten() -> None:
    counted, one, other, third = Counted(2), [1], [2], [3]
    for each in (one, other, one, third, one, other):
        assert counted.recent.of(each) == sum(each)
    assert counted.made == [one, other, third, other]


def test_nothing_takes_the_identity_of_what_is_kept() -> None:
    recent = Recent[list[int], int](sum, 1000)
    assert [recent.of([number]) for number in range(1000)] == [*range(1000)]


def test_nothing_stays_nothing() -> None:
    counted, empty = Counted(1), list[int]()
    assert counted.recent.of(empty) == counted.recent.of(empty) == 0
    assert counted.made == [empty]
