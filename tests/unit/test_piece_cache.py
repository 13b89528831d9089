"""Pieces that are kept in memory of a fixed size."""

import ctypes
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from offload.tiers.near.piece_cache import PieceCache
from offload.types import PAGE_BYTES

Ints = NDArray[np.int64]


def make_cache(capacity: int) -> PieceCache:
    return PieceCache(capacity * PAGE_BYTES + 1, PAGE_BYTES - 1)


def keep(cache: PieceCache, keys: Sequence[int], num_bytes: int = 100) -> None:
    """Keep pieces that are full of the last byte of their keys."""
    source = np.array(keys, np.int64).astype(np.uint8)[:, None].repeat(num_bytes, 1)
    addresses = source.ctypes.data + num_bytes * np.arange(len(keys))
    cache.keep(np.array(keys, np.int64), addresses, np.full(len(keys), num_bytes))


def take(cache: PieceCache, keys: Sequence[int]) -> Ints:
    return cache.take(np.array(keys, np.int64))


def kept(cache: PieceCache, keys: Sequence[int]) -> list[int]:
    """Return the keys that are kept, having checked what is kept of them."""
    places = take(cache, keys)
    found = [key for key, place in zip(keys, places, strict=True) if place >= 0]
    addresses = cache.address(places[places >= 0]).tolist()
    for key, address in zip(found, addresses, strict=True):
        assert ctypes.string_at(address, 100) == bytes([key & 0xFF]) * 100
    cache.give_back(places[places >= 0])
    cache.check_integrity()
    return found


def test_pieces_that_fit_are_kept_and_counted() -> None:
    cache = make_cache(4)
    keep(cache, [7, -3, 9])
    assert kept(cache, [9, 8, 7, -3]) == [9, 7, -3]
    assert (cache.num_hits, cache.num_misses) == (3, 1)
    assert cache.num_bytes == 3 * PAGE_BYTES


@pytest.mark.parametrize("capacity", [0, 1, 5])
def test_pieces_beyond_the_limit_are_not_kept(capacity: int) -> None:
    cache = make_cache(capacity)
    keep(cache, range(7))
    assert len(kept(cache, range(7))) == capacity
    assert cache.num_bytes == capacity * PAGE_BYTES


def test_one_in_eight_new_pieces_takes_the_place_of_the_least_recently_used() -> None:
    cache = make_cache(4)
    keep(cache, range(4))
    assert kept(cache, [0, 2]) == [0, 2]
    keep(cache, range(10, 18))
    assert kept(cache, [*range(4), *range(10, 18)]) == [0, 2, 3, 10]


def test_turns_through_more_than_fits_still_find_some() -> None:
    cache, found = make_cache(20), []
    for _ in range(12):
        there = kept(cache, range(32))
        keep(cache, sorted(set(range(32)) - set(there)))
        found.append(len(there))
    assert min(found[1:]) >= 16


def test_piece_that_is_kept_already_is_not_kept_twice() -> None:
    cache = make_cache(3)
    keep(cache, [1])
    keep(cache, [1, 2])
    assert kept(cache, [1, 2]) == [1, 2]
    assert cache.num_bytes == 2 * PAGE_BYTES


def test_piece_in_use_is_not_overwritten() -> None:
    cache = make_cache(2)
    keep(cache, [1, 2])
    places = take(cache, [1, 2])
    addresses = cache.address(places).tolist()
    keep(cache, range(20, 60))
    assert [ctypes.string_at(address, 1) for address in addresses] == [b"\x01", b"\x02"]
    cache.give_back(places)
    keep(cache, range(60, 76))
    assert kept(cache, [1, 2, *range(20, 76)]) == [60, 61]


@pytest.mark.parametrize("forget", ["drop", "limit"])
def test_piece_that_goes_while_in_use_is_readable_until_it_is_given_back(forget: str) -> None:
    cache = make_cache(2)
    keep(cache, [1, 2])
    places = take(cache, [1])
    cache.drop([1]) if forget == "drop" else cache.limit(0)
    assert kept(cache, [1]) == []
    keep(cache, [3, 4])
    assert ctypes.string_at(int(cache.address(places)[0]), 2) == b"\x01\x01"
    before = cache.num_bytes
    cache.give_back(places)
    assert cache.num_bytes == before - PAGE_BYTES
    cache.check_integrity()


def test_limit_that_is_lowered_drops_the_least_recently_used_and_empties_their_memory() -> None:
    cache = make_cache(4)
    keep(cache, range(1, 5))
    assert kept(cache, [1]) == [1]
    places = take(cache, [2])
    [address] = cache.address(places).tolist()
    cache.give_back(places)
    cache.limit(2 * PAGE_BYTES)
    assert kept(cache, range(1, 5)) == [1, 2]
    cache.limit(0)
    assert cache.num_bytes == 0
    assert ctypes.string_at(address, 100) == bytes(100)


def test_limit_that_is_raised_again_lets_more_in() -> None:
    cache = make_cache(3)
    cache.limit(0)
    keep(cache, [1])
    assert kept(cache, [1]) == []
    cache.limit(100 * PAGE_BYTES)
    keep(cache, range(5))
    assert len(kept(cache, range(5))) == 3


def test_keys_that_are_dropped_are_missed() -> None:
    cache = make_cache(3)
    keep(cache, [1, 2])
    cache.drop([2, 5])
    assert kept(cache, [1, 2]) == [1]
