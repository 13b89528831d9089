"""A worker is told what changed of a row, and knows the whole row; lanes follow the batch."""

import numpy as np
import pytest
from numpy.typing import NDArray

from offload.tiers.near.tables import Lanes, update_of

Slots = NDArray[np.int64]


def told(before: list[int], now: list[int]) -> tuple[int, list[int]]:
    """Return what is kept and what is added of a row that was ``before``."""
    known: dict[int, Slots] = {7: np.array(before, np.int64)} if before else {}
    update = update_of(known, 7, np.array(now, np.int64))
    assert update.key == 7
    assert [*before[: update.kept], *update.added.tolist()] == now
    assert known[7].tolist() == now
    return update.kept, update.added.tolist()


@pytest.mark.parametrize(
    ("before", "now", "kept", "added"),
    [
        ([], [1, 2], 0, [1, 2]),
        ([1, 2], [1, 2], 2, []),
        ([1, 2], [1, 2, 3, 4], 2, [3, 4]),
        ([1, 2, 3], [1], 1, []),
        ([1, 2, 3], [1, 9, 3], 1, [9, 3]),
        ([1, 2, 3], [4, 2, 3, 5], 0, [4, 2, 3, 5]),
        ([1, 2, 3], [], 0, []),
        ([], [], 0, []),
    ],
    ids=str,
)
def test_update_names_what_follows_the_common_beginning(
    before: list[int], now: list[int], kept: int, added: list[int]
) -> None:
    assert told(before, now) == (kept, added)


def test_rows_of_several_names_are_known_apart() -> None:
    known: dict[int, Slots] = {}
    update_of(known, 0, np.array([1, 2]))
    assert update_of(known, 1, np.array([1, 2, 3])).kept == 0
    assert update_of(known, 0, np.array([1, 2, 3])).kept == 2


def test_lanes_are_the_rows_of_a_batch_that_is_written_position_by_position() -> None:
    places = [(layer, token) for token in (0, 64, 128) for layer in (0, 1) for _ in range(3)]
    lanes = Lanes().of_all(places)
    assert lanes == [(layer, row) for _ in range(3) for layer in (0, 1) for row in range(3)]


def test_lanes_of_one_row_stay_the_same_over_several_writes() -> None:
    lanes = Lanes()
    assert {lanes.of(2, token) for token in (0, 64, 128)} == {(2, 0)}
