"""What the policies are made of: ranks that rise, ghosts, second hits, shares of layers."""

import pytest

from offload.errors import ConfigError
from offload.tiers.eviction import LeastRecentlyUsed
from offload.tiers.eviction_admission import SecondHit
from offload.tiers.eviction_ghosts import Ghosts
from offload.tiers.eviction_layers import ByLayer
from offload.tiers.eviction_ranks import RisingRanks
from offload.types import ChunkId
from tests.contracts.eviction_contract import ids


def make_ranks(*ranks: float) -> RisingRanks:
    found = RisingRanks()
    for chunk, rank in enumerate(ranks):
        found.insert(ChunkId(chunk), rank)
    return found


def test_equal_ranks_are_found_in_the_order_of_arrival() -> None:
    assert make_ranks(1.0, 0.0, 1.0, 0.0).lowest(4) == [1, 3, 0, 2]


def test_rank_that_rose_is_found_where_it_is_now() -> None:
    ranks = make_ranks(1.0, 2.0, 3.0)
    ranks.raise_to(ChunkId(0), 2.5)
    assert ranks.lowest(3) == [1, 0, 2]
    ranks.raise_to(ChunkId(0), 9.0)
    assert ranks.lowest(1) == [1]
    assert ranks.lowest(3) == [1, 2, 0]


def test_heap_stays_small_however_many_chunks_come_and_go() -> None:
    ranks = make_ranks(0.0)
    for i in range(1, 5000):
        ranks.insert(ChunkId(i), float(i))
        ranks.remove(ChunkId(i))
    assert len(ranks._heap) < 200
    assert ranks.lowest(9) == [0]


def test_rank_that_falls_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="falls"):
        make_ranks(1.0).raise_to(ChunkId(0), 0.5)


def test_ghost_that_was_written_longest_ago_is_forgotten_first() -> None:
    ghosts = Ghosts[str](limit=2)
    for chunk, record in [(0, "a"), (1, "b"), (0, "c"), (2, "d")]:
        ghosts.put(ChunkId(chunk), record)
    assert [ghosts.get(chunk) for chunk in ids(0, 1, 2)] == ["c", None, "d"]
    assert ghosts.take(ChunkId(0)) == "c"
    assert ghosts.take(ChunkId(0)) is None
    assert len(ghosts) == 1


def test_negative_number_of_ghosts_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1 chunks"):
        Ghosts[int](-1)


def test_chunk_is_admitted_when_it_is_read_for_the_second_time() -> None:
    rule = SecondHit(window_steps=2)
    assert rule.admit(ids(0, 1)) == []
    assert rule.admit(ids(2, 1)) == [1]
    assert rule.admit(ids(1, 0)) == [0]


def test_reads_that_are_far_apart_do_not_count_as_two() -> None:
    rule = SecondHit(window_steps=2)
    rule.admit(ids(0))
    rule.admit([])
    rule.admit([])
    assert rule.admit(ids(0)) == []
    assert rule.admit(ids(0)) == [0]


def test_window_of_no_steps_admits_everything() -> None:
    rule = SecondHit(window_steps=0)
    assert rule.admit(ids(3, 1)) == [3, 1]


def test_second_hits_remember_no_more_than_their_window() -> None:
    rule = SecondHit(window_steps=3)
    for step in range(100):
        rule.admit(ids(*range(10 * step, 10 * step + 10)))
    assert len(rule._last_read) == 40


def test_negative_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1 steps"):
        SecondHit(-1)


def make_layers(shares: list[float] | None, *counts: int) -> ByLayer:
    """Return a policy that holds so many chunks of each layer; chunk ``10 * layer + i``."""
    policy = ByLayer(LeastRecentlyUsed, lambda chunk: chunk // 10, shares)
    for layer, count in enumerate(counts):
        for i in range(count):
            policy.insert(ChunkId(10 * layer + i))
    return policy


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        (None, [0, 1, 2]),
        ([0.5, 0.25, 0.25], [0, 10, 20]),
        ([0.75, 0.25], [20, 21, 22]),
        ([0.0, 0.5, 0.5], [0, 1, 2]),
    ],
    ids=str,
)
def test_victims_come_from_the_layer_that_is_furthest_beyond_its_share(
    shares: list[float] | None, expected: list[int]
) -> None:
    assert sorted(make_layers(shares, 6, 3, 3).victims(3)) == expected


def test_within_a_layer_its_own_policy_chooses() -> None:
    policy = make_layers([0.0, 1.0], 3, 3)
    policy.touch(ids(0, 11, 99))
    assert policy.victims(3) == [1, 2, 0]


def test_other_layers_make_room_where_one_has_only_excluded_chunks() -> None:
    policy = make_layers([0.0, 1.0], 2, 3)
    assert policy.victims(2, exclude=set(ids(0, 1))) == [10, 11]


def test_new_shares_hold_from_the_next_victims_on() -> None:
    policy = make_layers([0.0, 1.0], 3, 3)
    policy.set_shares([1.0, 0.0])
    assert policy.victims(3) == [10, 11, 12]


def test_layer_gives_up_nothing_below_its_share_while_another_is_beyond() -> None:
    policy = make_layers([0.5, 0.5], 8, 4)
    for victim in policy.victims(4):
        policy.remove(victim)
    assert sorted(policy.victims(8)) == [4, 5, 6, 7, 10, 11, 12, 13]
