"""Checksums of many pieces are those that xxhash gives one by one."""

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from threading import Barrier

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from offload.kernels import xxh3

LENGTHS = [0, 1, 16, 240, 241, 256, 257, 1024, 1025, 1088, 1089, 4095, 4096, 4097, 8192, 100_001]
"""Both sides of where the algorithm does something else, and those of our units."""

MEMORY = np.random.default_rng(0).integers(0, 256, 1 << 18, np.uint8)


def expected(offsets: list[int], num_bytes: int) -> list[int]:
    bytes_ = MEMORY.data
    return [xxhash.xxh3_64_intdigest(bytes_[start : start + num_bytes]) for start in offsets]


def found(offsets: list[int], num_bytes: int) -> list[int]:
    places = np.array(offsets, np.int64) + MEMORY.ctypes.data
    return list(map(int, xxh3.checksums(places, num_bytes)))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("num_bytes", LENGTHS)
def test_checksums_of_a_length_at_every_alignment_are_those_of_xxhash(
    num_bytes: int, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_compiled and find_spec("numba") is None:
        pytest.skip("compiled kernels need numba")
    if not is_compiled:
        monkeypatch.setattr(xxh3, "compiled", lambda name: None)
    offsets = [*range(70), 70, 3, 4096, len(MEMORY) - num_bytes]
    assert found(offsets, num_bytes) == expected(offsets, num_bytes)


@given(st.integers(0, 9000), st.lists(st.integers(0, 1 << 17), max_size=20))
def test_checksums_of_pieces_anywhere_are_those_of_xxhash(
    num_bytes: int, offsets: list[int]
) -> None:
    assert found(offsets, num_bytes) == expected(offsets, num_bytes)


@given(st.integers(241, 5000), st.data())
def test_checksum_of_a_piece_with_a_flipped_bit_is_another(
    num_bytes: int, data: st.DataObject
) -> None:
    piece = MEMORY[:num_bytes].copy()
    place = np.array([piece.ctypes.data])
    before = xxh3.checksums(place, num_bytes)
    piece[data.draw(st.integers(0, num_bytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert xxh3.checksums(place, num_bytes) != before


def test_checksums_on_several_threads_at_once_are_each_thread_own() -> None:
    together, orders = Barrier(4), [list(range(start, 90_000, 611)) for start in range(4)]

    def run(offsets: list[int]) -> list[int]:
        together.wait(timeout=60)
        return found(offsets, 4096)

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(run, orders))
    assert results == [expected(order, 4096) for order in orders]
