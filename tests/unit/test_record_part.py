"""Parts of records: in disk order, and divided among threads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.tiers.buffers import Buffers
from offload.tiers.io_plan import MAX_OP_BYTES, MIN_SHARE
from offload.tiers.pool import page_aligned
from offload.tiers.record_io import Place
from offload.tiers.record_part import Parts
from offload.tiers.record_parts import plan_parts
from offload.tiers.segment import slot_at
from offload.types import PAGE_BYTES, ChunkInfo


def parts_of(places: list[Place], firsts: list[int], num_bytes: int = PAGE_BYTES) -> Parts:
    """Return parts whose infos say where in the request they were."""
    out = Buffers.of([page_aligned(num_bytes)] * len(places))
    slots = [slot_at(*place) for place in places]
    return Parts.of(slots, [ChunkInfo(i, 0, 0) for i in range(len(places))], firsts, out)


@pytest.mark.parametrize(
    ("num_parts", "num_threads", "num_bytes", "sizes"),
    [
        (0, 4, 1, []),
        (1, 4, 1, [1]),
        (MIN_SHARE + 1, 8, 1, [MIN_SHARE, 1]),
        (64, 8, 1, [8] * 8),
        (65, 8, 1, [9] * 7 + [2]),
        (10, 1, MAX_OP_BYTES // 4 - PAGE_BYTES, [4, 4, 2]),
        (3, 8, MAX_OP_BYTES, [1, 1, 1]),
    ],
)
def test_shares_grow_until_each_thread_has_one(
    num_parts: int, num_threads: int, num_bytes: int, sizes: list[int]
) -> None:
    parts = parts_of([(0, index) for index in range(num_parts)], [0] * num_parts, num_bytes)
    jobs = plan_parts(parts, num_threads, MIN_SHARE)
    assert [job.num_parts for job in jobs] == sizes


@given(
    wanted=st.lists(
        st.tuples(st.tuples(st.integers(0, 2), st.integers(0, 9)), st.integers(0, 3)), max_size=40
    ),
    num_threads=st.integers(1, 5),
    most=st.integers(1, 12),
)
def test_every_part_is_in_one_share_of_one_segment_in_disk_order(
    wanted: list[tuple[Place, int]], num_threads: int, most: int
) -> None:
    places, firsts = [place for place, _ in wanted], [first for _, first in wanted]
    num_bytes = MAX_OP_BYTES // most - PAGE_BYTES
    jobs = plan_parts(parts_of(places, firsts, num_bytes), num_threads, MIN_SHARE)
    found = [part for job in jobs for part in job.each()]
    assert sorted(part.info.chunk_id for part in found) == list(range(len(wanted)))
    assert all((part.place, part.first) == wanted[part.info.chunk_id] for part in found)
    for job in jobs:
        assert 0 < job.num_parts <= most
        order = [(part.place, part.first) for part in job.each()]
        assert order == sorted(order)
        assert len({segment for segment, _ in job.places()}) == 1
        starts = job.record_starts().tolist()
        assert [job.places()[start] for start in starts] == sorted(set(job.places()))
