import pytest

from offload.errors import CapacityError
from offload.tiers.segment import Freed, Hole, SegmentTable, locate
from offload.types import SlotId


def _punch_all(table: SegmentTable, freed: Freed) -> None:
    for hole in freed.holes:
        table.punched(hole)


def test_slots_of_a_stream_are_consecutive_positions_across_calls() -> None:
    table = SegmentTable(20, records_per_segment=4)
    first, other, second = table.allocate(2, 0), table.allocate(1, 1), table.allocate(4, 0)
    assert [locate(slot) for slot in first] == [(0, 0), (0, 1)]
    assert [locate(slot) for slot in other] == [(1, 0)]
    assert [locate(slot) for slot in second] == [(0, 2), (0, 3), (2, 0), (2, 1)]
    table.check_integrity()


def test_slots_that_were_freed_are_never_handed_out_again() -> None:
    table = SegmentTable(4, records_per_segment=4)
    seen: set[SlotId] = set()
    for _ in range(10):
        slots = table.allocate(3, 0)
        assert seen.isdisjoint(slots)
        seen.update(slots)
        table.free(slots)
        table.check_integrity()


def test_allocate_beyond_capacity_takes_nothing() -> None:
    table = SegmentTable(3, records_per_segment=4)
    table.allocate(2, 0)
    with pytest.raises(CapacityError, match="2 slots requested, 1 free of 3"):
        table.allocate(2, 0)
    assert table.num_used == 2
    table.check_integrity()


def test_free_inside_a_living_segment_reports_each_hole() -> None:
    table = SegmentTable(8, records_per_segment=8)
    slots = table.allocate(8, 0)
    freed = table.free([slots[i] for i in (6, 1, 2, 3)])
    assert freed == Freed([], [Hole(0, 1, 3), Hole(0, 6, 1)])
    table.check_integrity()


def test_space_of_a_hole_counts_as_used_until_it_is_punched() -> None:
    table = SegmentTable(4, records_per_segment=4)
    slots = table.allocate(4, 0)
    freed = table.free(slots[:2])
    assert table.num_used == 4
    _punch_all(table, freed)
    assert table.num_used == 2
    table.check_integrity()


@pytest.mark.parametrize("can_punch", [True, False])
def test_space_comes_back_when_the_last_record_dies(can_punch: bool) -> None:
    table = SegmentTable(8, records_per_segment=4)
    slots = table.allocate(6, 0)
    freed = table.free(slots[1:6])
    if can_punch:
        _punch_all(table, freed)
    assert freed.dead_segments == [1]
    assert table.free(slots[:1]) == Freed([0], [])
    assert table.num_used == 0
    assert table.segments == []
    table.check_integrity()


def test_stream_whose_open_segment_died_goes_on_in_a_new_one() -> None:
    table = SegmentTable(8, records_per_segment=4)
    table.free(table.allocate(1, 5))
    [slot] = table.allocate(1, 5)
    assert locate(slot) == (1, 0)


def test_held_slots_are_those_allocated_and_not_freed() -> None:
    table = SegmentTable(8, records_per_segment=4)
    slots = table.allocate(2, 0)
    table.free(slots[:1])
    assert [table.holds(slot) for slot in (*slots, SlotId(2), SlotId(400))] == [
        False,
        True,
        False,
        False,
    ]
