"""How runs of chunks are cut into segments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError
from offload.sparse.segments import SegmentSizes

SIZES = [(8192, 1024), (64,), (4096, 512, 64), (128, 64)]


@given(sizes=st.sampled_from(SIZES), num_chunks=st.integers(0, 600))
def test_cuts_follow_each_other_from_the_first_chunk(
    sizes: tuple[int, ...], num_chunks: int
) -> None:
    stop = 0
    for start, end in SegmentSizes(sizes).cut(num_chunks, 64):
        assert start == stop < end
        stop = end
    assert stop <= num_chunks


@given(sizes=st.sampled_from(SIZES), num_chunks=st.integers(0, 600))
def test_what_is_covered_never_shrinks_and_lags_by_less_than_two_of_the_smallest(
    sizes: tuple[int, ...], num_chunks: int
) -> None:
    def covered(count: int) -> int:
        return sum(stop - start for start, stop in SegmentSizes(sizes).cut(count, 64))

    assert covered(num_chunks) <= covered(num_chunks + 1)
    assert num_chunks - covered(num_chunks) <= sizes[-1] // 64


@given(sizes=st.sampled_from(SIZES), num_chunks=st.integers(0, 600))
def test_every_new_cut_was_coming_when_chunks_came_one_by_one(
    sizes: tuple[int, ...], num_chunks: int
) -> None:
    plan = SegmentSizes(sizes)
    begun = {cut for count in range(num_chunks) for cut in plan.coming(count, 64)}
    assert set(plan.cut(num_chunks, 64)) <= begun


@pytest.mark.parametrize("num_chunks", [127, 128, 300, 1000])
def test_largest_are_all_that_is_complete(num_chunks: int) -> None:
    cuts = SegmentSizes((8192, 1024)).largest(num_chunks, 64)
    assert cuts == [(start, start + 128) for start in range(0, num_chunks - 127, 128)]


def test_segments_smaller_than_a_chunk_are_chunks() -> None:
    assert SegmentSizes((4, 2)).cut(3, 64) == [(0, 1), (1, 2)]


@pytest.mark.parametrize("tokens", [(), (0,), (1024, 8192), (1000, 300), (8, -8)])
def test_sizes_that_do_not_nest_are_refused(tokens: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="do not descend"):
        SegmentSizes(tokens)
