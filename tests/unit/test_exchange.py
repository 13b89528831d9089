"""Exchanges of chunks between memory and disk: who, when, and what becomes of the bytes."""

import os
from pathlib import Path

import pytest

from offload.errors import ConfigError
from offload.placement import PLACEMENTS, check_placement
from tests.support.disk import WAIT_S, FlakyCall, Gate
from tests.support.exchanges import open_exchanges
from tests.support.stores import LAYOUT, check, put

MOVING = [name for name in PLACEMENTS if name != "first"]
HOT = {0: 0.2, 1: 0.2, 6: 0.3, 7: 0.3}
"""Of eight chunks, of which the first four are in memory; 2 and 3 get nothing."""


@pytest.mark.parametrize("placement", MOVING)
def test_chunks_that_get_attention_change_places_with_those_that_get_none(
    placement: str, tmp_path: Path
) -> None:
    with open_exchanges(tmp_path, 8, placement=placement) as found:
        found.run(HOT, rounds=12)
        assert found.in_memory == {0, 1, 6, 7}
        assert found.counters.promoted_chunks == found.counters.demoted_chunks == 2
        assert found.counters.failed_exchanges == 0


def test_chunks_stay_where_they_were_until_all_transfers_are_over(tmp_path: Path) -> None:
    gate = Gate()
    pwritev = FlakyCall(os.pwritev, gate, armed=False)
    with open_exchanges(tmp_path, 8, pwritev=pwritev) as found:
        pwritev.armed = True
        found.observe(HOT)
        assert gate.reached.wait(WAIT_S)
        found.observe(HOT)
        assert found.in_memory == {0, 1, 2, 3}
        check(found.store, dict(list(found.contents.items())[:4]))
        gate.open()
        found.exchange.settle()
        assert found.in_memory == {0, 1, 6, 7}


def test_free_slots_are_filled_without_sending_anybody_down(tmp_path: Path) -> None:
    with open_exchanges(tmp_path, 8) as found:
        for position in (0, 1):
            chunk = found.chunks[position]
            found.store.release([chunk])
        found.contents = dict(list(found.contents.items())[2:])
        found.run({4: 0.5, 5: 0.5})
        assert found.in_memory == {0, 1, 4, 5}
        assert found.counters.demoted_chunks == 0


def test_chunk_that_leaves_again_is_not_written_again(tmp_path: Path) -> None:
    with open_exchanges(tmp_path, 8) as found:
        found.run(HOT, rounds=8)
        stored = found.counters.stored_bytes["disk"]
        found.run({2: 0.5, 3: 0.5}, rounds=40)
        assert {2, 3} <= found.in_memory
        found.run(HOT, rounds=40)
        assert {6, 7} <= found.in_memory
        assert found.counters.promoted_chunks > 4
        # The chunks 0 and 1 may have left for the first time meanwhile.
        assert found.counters.stored_bytes["disk"] - stored <= 2 * LAYOUT.slot_bytes


@pytest.mark.parametrize("placement", ["mass", "cumulative", "recurrence", "layers"])
def test_steady_attention_ends_all_movement(placement: str, tmp_path: Path) -> None:
    masses = {position: 0.01 * (1 + position % 7) for position in range(24)}
    with open_exchanges(tmp_path, 24, memory=(8,), placement=placement) as found:
        found.run(masses, rounds=40)
        moved = found.counters.promoted_chunks
        found.run(masses, rounds=40)
        assert found.counters.promoted_chunks == moved


@pytest.mark.parametrize("placement", MOVING)
def test_attention_that_goes_to_and_fro_moves_each_chunk_once_in_some_rounds(
    placement: str, tmp_path: Path
) -> None:
    one, other = {0: 0.5, 1: 0.5}, {2: 0.5, 3: 0.5}
    with open_exchanges(tmp_path, 4, memory=(2,), placement=placement) as found:
        for _ in range(20):
            found.run(one)
            found.run(other)
        assert found.counters.promoted_chunks <= 2 * 40 / 4


def test_newcomers_no_better_than_a_tenth_of_those_in_memory_stay_below(tmp_path: Path) -> None:
    least, others = {0: 0.1}, dict.fromkeys(range(2, 32), 0.3)
    with open_exchanges(tmp_path, 33, memory=(32,)) as found:
        found.run(least | others | {1: 0.15, 32: 0.12}, rounds=12)
        assert 32 not in found.in_memory
        found.run(least | others | {1: 0.15, 32: 0.4}, rounds=30)
        assert found.in_memory == set(range(33)) - {0}


def test_best_chunks_rise_to_the_fastest_tier_and_the_next_ones_below_it(tmp_path: Path) -> None:
    masses = {0: 0.1, 1: 0.1, 2: 0.1, 8: 0.5, 9: 0.4, 10: 0.3}
    with open_exchanges(tmp_path, 12, memory=(2, 2), most=2) as found:
        found.run(masses, rounds=20)
        levels = [found.store.level_of(found.chunks[position]) for position in (8, 9, 10)]
        assert levels == [0, 0, 1]


def test_protected_chunk_in_memory_does_not_make_room(tmp_path: Path) -> None:
    with open_exchanges(tmp_path, 8, memory=(2,)) as found:
        held = found.chunks[:2]
        found.store.table.protect(held)
        found.run({6: 0.5}, rounds=3)
        assert found.in_memory == {0, 1}
        found.store.unprotect(held)


def test_chunk_that_is_protected_while_it_is_to_leave_stays_and_is_counted(tmp_path: Path) -> None:
    with open_exchanges(tmp_path, 8) as found:
        found.observe(HOT)
        held = found.chunks[:4]
        found.store.table.protect(held)
        found.exchange.settle()
        assert found.in_memory == {0, 1, 2, 3}
        assert found.counters.failed_exchanges == 2
        found.store.unprotect(held)


@pytest.mark.parametrize("position", [2, 3, 6, 7])
def test_chunk_released_during_its_exchange_is_gone_when_that_is_over(
    position: int, tmp_path: Path
) -> None:
    with open_exchanges(tmp_path, 8) as found:
        chunk = found.chunks[position]
        found.observe(HOT)
        found.store.release([chunk])
        del found.contents[chunk]
        found.exchange.settle()
        assert chunk not in found.store.table
        found.run({})


def test_shared_chunk_moves_once_for_all_who_refer_to_it(tmp_path: Path) -> None:
    with open_exchanges(tmp_path, 8) as found:
        chunks = found.chunks
        found.store.table.share(chunks)
        found.run(HOT, rounds=8)
        found.store.release(chunks)
        assert found.in_memory == {0, 1, 6, 7}
        check(found.store, found.contents)


def test_tier_that_shrinks_during_an_exchange_keeps_every_chunk(tmp_path: Path) -> None:
    gate = Gate()
    preadv = FlakyCall(os.preadv, gate, armed=False)
    with open_exchanges(tmp_path, 8, preadv=preadv) as found:
        preadv.armed = True
        found.observe(HOT)
        found.store.shrink(0, 1)
        gate.open()
        found.run(HOT)
        assert len(found.in_memory) <= 1


def test_chunks_put_meanwhile_are_ranked_as_well(tmp_path: Path) -> None:
    with open_exchanges(tmp_path, 6) as found:
        found.run({0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5})
        found.contents |= put(found.store, 2, seed=2)
        found.store.drain()
        found.run({0: 0.5, 1: 0.5, 6: 0.6, 7: 0.6}, rounds=20)
        assert found.in_memory == {0, 1, 6, 7}


def test_unknown_placement_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown placement 'best'; known: first, recent, mass"):
        check_placement("best")
