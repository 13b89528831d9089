"""What sets one eviction policy apart from another; what they share is in the contract."""

import pytest

from offload.tiers.eviction import EvictionPolicy, KeepFirst, LeastRecentlyUsed
from offload.types import ChunkId
from tests.contracts.eviction_contract import ids


def fill(policy: EvictionPolicy) -> None:
    for chunk in ids(0, 1, 2, 3):
        policy.insert(chunk)


def test_keep_first_never_evicts() -> None:
    policy = KeepFirst()
    fill(policy)
    assert policy.victims(4) == []


@pytest.mark.parametrize(
    ("touched", "expected"),
    [([], [0, 1, 2, 3]), ([0], [1, 2, 3, 0]), ([2, 0], [1, 3, 2, 0]), ([3, 3], [0, 1, 2, 3])],
)
def test_least_recently_used_evicts_in_the_order_of_last_use(
    touched: list[int], expected: list[int]
) -> None:
    policy = LeastRecentlyUsed()
    fill(policy)
    policy.touch(ids(*touched))
    assert policy.victims(4) == expected
    assert policy.victims(2) == expected[:2]


def test_least_recently_used_skips_excluded_chunks_and_goes_on() -> None:
    policy = LeastRecentlyUsed()
    fill(policy)
    assert policy.victims(2, exclude={ChunkId(0), ChunkId(2)}) == [1, 3]


def test_least_recently_used_counts_coming_back_as_a_use() -> None:
    policy = LeastRecentlyUsed()
    fill(policy)
    policy.remove(ChunkId(0))
    policy.insert(ChunkId(0))
    assert policy.victims(4) == [1, 2, 3, 0]


def test_least_recently_used_keeps_up_with_a_cyclic_scan_by_missing_every_time() -> None:
    # The reason exact attention does not use it: of four chunks read in turn, three fit.
    policy, resident, hits = LeastRecentlyUsed(), set[int](), 0
    for step in range(40):
        chunk = ChunkId(step % 4)
        hits += chunk in resident
        policy.touch([chunk])
        if chunk not in resident:
            for victim in policy.victims(max(0, len(resident) - 2)):
                policy.remove(victim)
                resident.discard(victim)
            policy.insert(chunk)
            resident.add(chunk)
    assert hits == 0
