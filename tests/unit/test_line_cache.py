"""The cache of lines by itself; sequences of calls are in the property tests."""

import numpy as np
import pytest

from offload.prefetch.line_cache import WAYS, LineCache, lines_that_fit

ROW_BYTES = 32


def make_cache(num_lines: int) -> LineCache:
    return LineCache(np.zeros((num_lines, ROW_BYTES), dtype=np.uint8))


def insert(cache: LineCache, first: int, stop: int) -> np.ndarray:
    """Insert keys in a row; return them."""
    keys = np.arange(first, stop)
    cache.insert(keys, np.zeros((len(keys), ROW_BYTES), dtype=np.uint8))
    return keys


@pytest.mark.parametrize("num_bytes", [0, 1, 383, 384, 1000, 1 << 20])
def test_lines_that_fit_with_their_books_are_whole_sets_within_the_bytes(num_bytes: int) -> None:
    num_lines = lines_that_fit(num_bytes, ROW_BYTES)
    assert num_lines % WAYS == 0
    cache = make_cache(num_lines)
    books = cache._keys.nbytes + cache._last_use.nbytes
    assert num_lines * ROW_BYTES + books <= num_bytes
    assert num_lines + WAYS > num_bytes // (ROW_BYTES + 16)


def test_lines_are_used_almost_all_before_many_keys_displace_each_other() -> None:
    cache = make_cache(1 << 12)
    keys = insert(cache, 0, 1 << 12)
    assert cache.num_used > 0.8 * cache.num_lines
    assert np.count_nonzero(cache.find(keys)) == cache.num_used


def test_row_found_now_outlives_rows_of_its_set_that_were_not() -> None:
    cache = make_cache(WAYS)
    insert(cache, 0, WAYS)
    cache.tick()
    cache.find(np.array([3]))
    insert(cache, 100, 100 + WAYS - 1)
    assert np.count_nonzero(cache.find(np.arange(WAYS))) == 1
    assert cache.find(np.array([3]))[0]


@pytest.mark.parametrize("num_chunks", [1, 60], ids=["by_key", "by_pass_over_all_lines"])
def test_dropped_runs_are_gone_and_the_others_are_not(num_chunks: int) -> None:
    cache, per_chunk = make_cache(1 << 10), 16
    keys = insert(cache, 0, 64 * per_chunk)
    held = cache.find(keys) != 0
    cache.drop(np.arange(num_chunks) * per_chunk, per_chunk)
    expected = held & (keys >= num_chunks * per_chunk)
    assert np.array_equal(cache.find(keys) != 0, expected)
    cache.check_integrity()


def test_cache_without_lines_holds_nothing() -> None:
    cache = make_cache(0)
    keys = insert(cache, 0, 4)
    cache.drop(keys, 1)
    assert not cache.find(keys).any()
