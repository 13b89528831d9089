"""Plans: every visible position is read once, in place where a regular grid allows it."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.prefetch.plan import LayerPlan, LoadGroup, ResidentRun, plan_layer
from offload.types import ChunkId, SlotId

Slots = list[list[int | None]]


def make_rows(batch: int, total: int) -> list[list[ChunkId]]:
    return [[ChunkId(100 * row + i) for i in range(total)] for row in range(batch)]


def plan(slots: Slots, max_group_chunks: int = 8, first: int = 0) -> LayerPlan:
    typed = [[None if slot is None else SlotId(slot) for slot in row] for row in slots]
    return plan_layer(make_rows(len(slots), len(slots[0])), typed, max_group_chunks, first)


def run_slots(run: ResidentRun, batch: int) -> list[list[int]]:
    """Spell out the grid: for each row, the slot of each position."""
    return [
        [run.base + row * run.strides[0] + i * run.strides[1] for i in range(run.count)]
        for row in range(batch)
    ]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Slots, int, int]:
    """Draw slots that are partly regular, a group size and a first position."""
    batch, total = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    kind = draw(st.sampled_from(["regular", "irregular", "shared"]))
    if kind == "regular":
        slots: Slots = [[i * batch + row for i in range(total)] for row in range(batch)]
    elif kind == "shared":
        slots = [list(range(total))] * batch
    else:
        some = st.lists(st.integers(0, 200), min_size=total, max_size=total, unique=True)
        slots = [list(row) for row in draw(st.lists(some, min_size=batch, max_size=batch))]
    missing = draw(st.sets(st.tuples(st.integers(0, batch - 1), st.integers(0, total - 1))))
    holed: Slots = [
        [None if (row, i) in missing else slot for i, slot in enumerate(slots[row])]
        for row in range(batch)
    ]
    return holed, draw(st.integers(batch, 16)), draw(st.integers(0, total))


@given(layouts())
def test_plan_of_any_layout_covers_each_visible_position_once(
    drawn: tuple[Slots, int, int],
) -> None:
    slots, max_group_chunks, first = drawn
    found = plan(slots, max_group_chunks, first)
    parts: list[ResidentRun | LoadGroup] = [*found.runs, *found.groups]
    covered = Counter(i for part in parts for i in range(part.start, part.start + part.count))
    assert covered == Counter(range(first, len(slots[0])))
    assert list(found.runs) == sorted(found.runs, key=lambda run: run.start)
    assert list(found.groups) == sorted(found.groups, key=lambda group: group.start)


@given(layouts())
def test_run_of_any_plan_is_a_grid_of_exactly_the_slots_of_its_positions(
    drawn: tuple[Slots, int, int],
) -> None:
    slots, max_group_chunks, first = drawn
    for run in plan(slots, max_group_chunks, first).runs:
        stop = run.start + run.count
        assert run_slots(run, len(slots)) == [row[run.start : stop] for row in slots]
        assert min(run.strides) >= 0


@given(layouts())
def test_group_of_any_plan_fits_a_buffer_and_lists_position_by_position(
    drawn: tuple[Slots, int, int],
) -> None:
    slots, max_group_chunks, first = drawn
    rows = make_rows(len(slots), len(slots[0]))
    for group in plan(slots, max_group_chunks, first).groups:
        positions = range(group.start, group.start + group.count)
        assert group.chunks == tuple(row[i] for i in positions for row in rows)
        assert len(group.chunks) <= max_group_chunks


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([[0, 1, 2, 3]], ResidentRun(0, 4, 0, (0, 1))),
        ([[0, 2, 4], [1, 3, 5]], ResidentRun(0, 3, 0, (1, 2))),
        ([[7, 8], [7, 8], [7, 8]], ResidentRun(0, 2, 7, (0, 1))),
        ([[5]], ResidentRun(0, 1, 5, (0, 0))),
    ],
    ids=["one_row", "two_rows", "beams", "one_chunk"],
)
def test_regular_slots_are_one_run_and_nothing_is_loaded(
    slots: Slots, expected: ResidentRun
) -> None:
    assert plan(slots) == LayerPlan((expected,), ())


def test_chunks_elsewhere_are_grouped_as_large_as_a_buffer() -> None:
    found = plan([[None] * 7, [None] * 7], max_group_chunks=6)
    assert found.runs == ()
    assert [(group.start, group.count) for group in found.groups] == [(0, 3), (3, 3), (6, 1)]


def test_position_with_one_row_elsewhere_is_loaded_for_all_rows() -> None:
    found = plan([[0, 2, 4], [1, None, 5]])
    assert [group.chunks for group in found.groups] == [(1, 101)]
    assert sum(run.count for run in found.runs) == 2


def test_rows_in_no_regular_order_are_loaded() -> None:
    found = plan([[9], [4], [6]])
    assert [group.chunks for group in found.groups] == [(0, 100, 200)]
    assert found.runs == ()


def test_plan_of_nothing_is_empty() -> None:
    assert plan_layer([], [], 4) == LayerPlan((), ())
    assert plan([[0, 1]], first=2) == LayerPlan((), ())
