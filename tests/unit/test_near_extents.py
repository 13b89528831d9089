"""Which pages are read for pieces of files."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from offload.tiers.near.extents import plan_reads
from offload.types import PAGE_BYTES


@st.composite
def files_and_runs(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Draw where the first run of each file begins, the bytes of a run, and numbers of runs."""
    num_files = draw(st.integers(1, 4))
    starts = st.integers(0, 3).map(lambda pages: pages * PAGE_BYTES)
    sizes = st.sampled_from([64, 192, 4096, 5000, 8192, 12288])
    runs = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))
    if draw(st.booleans()):
        runs = sorted(set(runs))
    firsts = draw(st.lists(starts, min_size=num_files, max_size=num_files))
    return firsts, draw(st.lists(sizes, min_size=num_files, max_size=num_files)), runs


@given(files_and_runs())
def test_extents_are_pages_that_cover_every_run_and_share_no_memory(
    drawn: tuple[list[int], list[int], list[int]],
) -> None:
    firsts, sizes, runs = (np.array(each) for each in drawn)
    starts = firsts[:, None] + sizes[:, None] * runs
    files = np.repeat(np.arange(len(sizes)), len(runs))
    extents, flat = plan_reads(files, starts.reshape(-1), np.repeat(sizes, len(runs)))
    places = flat.reshape(starts.shape)
    ends = extents.places + extents.num_bytes
    assert not (np.stack([extents.offsets, extents.num_bytes, extents.places]) % PAGE_BYTES).any()
    assert extents.places.tolist() == [0, *ends[:-1]]
    assert (np.diff(extents.file) >= 0).all()
    for file, size in enumerate(sizes):
        for start, place in zip(starts[file], places[file], strict=True):
            inside = np.flatnonzero((extents.places <= place) & (place + size <= ends))
            assert len(inside) == 1
            assert extents.file[inside] == file
            assert place - extents.places[inside] == start - extents.offsets[inside]


def test_runs_that_follow_each_other_are_read_at_once_and_others_apart() -> None:
    starts = PAGE_BYTES * np.array([1, 3, 5, 8, 17])
    extents, places = plan_reads(np.zeros(5, np.int64), starts, np.full(5, 2 * PAGE_BYTES))
    assert extents.offsets.tolist() == [PAGE_BYTES, 8 * PAGE_BYTES, 17 * PAGE_BYTES]
    assert (extents.num_bytes // PAGE_BYTES).tolist() == [6, 2, 2]
    assert (places // PAGE_BYTES).tolist() == [0, 2, 4, 6, 8]


def test_page_that_two_short_runs_share_is_read_once() -> None:
    extents, places = plan_reads(
        np.zeros(3, np.int64), np.array([100, 4000, 4096]), np.full(3, 300)
    )
    assert extents.num_bytes.tolist() == [2 * PAGE_BYTES]
    assert places.tolist() == [100, 4000, 4096]
