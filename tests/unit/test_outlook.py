"""What is kept of a layer: searches go on from the last one as long as the index only grows."""

import pytest
import torch

from offload.index.base import Hits, KeyIndex
from offload.index.bounds import BoundsIndex
from offload.index.tree import TreeIndex
from offload.sparse.outlook import Outlook
from tests.contracts.index_contract import random_rows

KEYS = random_rows(1, 64, 16)
HITS = Hits(torch.zeros(1, 1, dtype=torch.int64), 0)


def outlook_over(covered: range) -> Outlook:
    outlook = Outlook()
    outlook.follow(1, range(covered.start, covered.stop + 5), covered)
    outlook.remember(0, 0, TreeIndex.build(KEYS, KEYS), HITS)
    return outlook


@pytest.mark.parametrize(
    ("covered", "is_kept"),
    [
        (range(1, 20), True),
        (range(1, 30), True),
        (range(1, 19), False),  # cropped
        (range(2, 30), False),  # more is hidden
        (range(1, 1), False),
    ],
    ids=str,
)
def test_last_hits_are_kept_while_what_is_covered_grows_at_its_end(
    covered: range, is_kept: bool
) -> None:
    outlook = outlook_over(range(1, 20))
    outlook.follow(2, range(covered.start, covered.stop + 5), covered)
    assert (outlook.past == {0: HITS}) == is_kept
    assert bool(outlook.past) == is_kept


@pytest.mark.parametrize(
    ("kind", "position", "is_kept"),
    [(TreeIndex, 0, True), (TreeIndex, 1, False), (BoundsIndex, 0, False)],
)
def test_hits_of_the_first_position_are_kept_for_indexes_that_go_on_from_them(
    kind: type[KeyIndex], position: int, is_kept: bool
) -> None:
    outlook = Outlook()
    outlook.remember(3, position, kind.build(KEYS, KEYS), HITS)
    assert (3 in outlook.past) == is_kept
