import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.tiers.io_plan import (
    MAX_OP_BUFFERS,
    MAX_OP_BYTES,
    Extent,
    join_pieces,
    plan_io,
)

_KIB, _MIB = 1 << 10, 1 << 20


def _records(indexes: list[int], size: int, segment: int = 0) -> list[Extent]:
    return [Extent(segment, index * size, size, 2) for index in indexes]


def test_plan_of_nothing_is_nothing() -> None:
    assert plan_io([], 4) == []


def test_neighbours_in_any_order_become_one_operation_in_disk_order() -> None:
    [op] = plan_io(_records([3, 1, 2], 20 * _KIB), 4)
    assert (op.segment, op.offset, op.num_bytes) == (0, 20 * _KIB, 60 * _KIB)
    assert op.members == (1, 2, 0)


@pytest.mark.parametrize(
    "extents",
    [
        _records([1, 3], _KIB),
        _records([0], _KIB) + _records([1], _KIB, segment=1),
        _records([2, 2], _KIB),
    ],
    ids=["gap", "other_segment", "repeated"],
)
def test_extents_that_are_no_neighbours_are_not_joined(extents: list[Extent]) -> None:
    assert [op.members for op in plan_io(extents, 1)] == [(0,), (1,)]


@pytest.mark.parametrize("record_bytes", [16 * _KIB, 20 * _KIB, 64 * _KIB, 68 * _KIB, 260 * _KIB])
@pytest.mark.parametrize("num_threads", [1, 4, 16])
def test_small_neighbours_are_joined_into_operations_of_a_mebibyte(
    record_bytes: int, num_threads: int
) -> None:
    ops = plan_io(_records(list(range(512)), record_bytes), num_threads)
    assert all(op.num_bytes >= _MIB for op in ops[:-1])
    assert all(op.num_bytes <= MAX_OP_BYTES for op in ops)


def test_large_run_is_split_so_that_every_thread_has_work() -> None:
    ops = plan_io(_records(list(range(32)), 260 * _KIB), 4)
    assert len(ops) == 4


def test_extent_larger_than_an_operation_is_not_split() -> None:
    ops = plan_io(_records([0, 1], 2 * MAX_OP_BYTES), 1)
    assert [op.num_bytes for op in ops] == [2 * MAX_OP_BYTES] * 2


def test_operation_never_has_more_buffers_than_the_system_takes() -> None:
    ops = plan_io([Extent(0, i, 1, 3) for i in range(MAX_OP_BUFFERS)], 1)
    assert {len(op.members) for op in ops[:-1]} == {MAX_OP_BUFFERS // 3}


@given(
    places=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=60),
    size=st.integers(1, 9),
    num_threads=st.integers(1, 5),
    max_op_bytes=st.integers(1, 60),
    max_op_buffers=st.integers(2, 12),
)
def test_plan_serves_every_extent_once_and_keeps_the_limits(
    places: list[tuple[int, int]],
    size: int,
    num_threads: int,
    max_op_bytes: int,
    max_op_buffers: int,
) -> None:
    extents = [Extent(segment, index * size, size, 2) for segment, index in places]
    ops = plan_io(
        extents,
        num_threads,
        max_op_bytes=max_op_bytes,
        min_split_bytes=10,
        max_op_buffers=max_op_buffers,
    )
    assert sorted(i for op in ops for i in op.members) == list(range(len(extents)))
    assert [(op.segment, op.offset) for op in ops] == sorted((op.segment, op.offset) for op in ops)
    for op in ops:
        at = op.offset
        for i in op.members:
            assert (extents[i].segment, extents[i].offset) == (op.segment, at)
            at += extents[i].num_bytes
        assert at == op.offset + op.num_bytes
        assert op.num_bytes <= max_op_bytes or len(op.members) == 1
        assert 2 * len(op.members) <= max_op_buffers


def _pieces(*spans: tuple[int, int]) -> list[tuple[int, memoryview]]:
    return [(offset, memoryview(bytearray(num_bytes))) for offset, num_bytes in spans]


@pytest.mark.parametrize(
    ("spans", "reads"),
    [
        ([], []),
        ([(5, 3), (8, 2)], [(5, [3, 2])]),
        ([(5, 3), (12, 2)], [(5, [3, 4, 2])]),
        ([(5, 3), (13, 2)], [(5, [3]), (13, [2])]),
        ([(5, 3), (5, 3)], [(5, [3]), (5, [3])]),
        ([(5, 3), (7, 3)], [(5, [3]), (7, [3])]),
        ([(0, 1), (2, 1), (9, 1), (10, 1)], [(0, [1, 1, 1]), (9, [1, 1])]),
    ],
    ids=["none", "adjacent", "small_gap", "large_gap", "twice", "overlap", "several"],
)
def test_pieces_are_joined_over_gaps_that_fit_into_the_spill(
    spans: list[tuple[int, int]], reads: list[tuple[int, list[int]]]
) -> None:
    joined = join_pieces(_pieces(*spans), memoryview(bytearray(4)))
    assert [(offset, [len(view) for view in views]) for offset, views in joined] == reads


@given(
    spans=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), max_size=30),
    spill_bytes=st.integers(0, 30),
)
def test_joined_reads_fill_every_piece_with_what_lies_there(
    spans: list[tuple[int, int]], spill_bytes: int
) -> None:
    file = bytes(range(220))
    pieces = _pieces(*sorted(spans))
    reads = join_pieces(pieces, memoryview(bytearray(spill_bytes)))
    for offset, views in reads:
        for view in views:
            view[:] = file[offset : offset + len(view)]
            offset += len(view)
    assert [bytes(view) for _, view in pieces] == [
        file[offset : offset + len(view)] for offset, view in pieces
    ]
    assert sum(len(views) for _, views in reads) <= 2 * len(pieces)
