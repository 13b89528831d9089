import stat
from pathlib import Path

import pytest

from offload.errors import CapacityError, ConfigError, StorageError
from offload.tiers.segment import Freed, Hole, SegmentFiles, SegmentTable
from offload.types import PAGE_BYTES, SlotId


def _punch_all(table: SegmentTable, freed: Freed) -> None:
    for hole in freed.holes:
        table.punched(hole)


def test_slots_of_a_stream_are_consecutive_positions_across_calls() -> None:
    table = SegmentTable(20, records_per_segment=4)
    first, other, second = table.allocate(2, 0), table.allocate(1, 1), table.allocate(4, 0)
    assert [table.locate(slot) for slot in first] == [(0, 0), (0, 1)]
    assert [table.locate(slot) for slot in other] == [(1, 0)]
    assert [table.locate(slot) for slot in second] == [(0, 2), (0, 3), (2, 0), (2, 1)]
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
    assert table.locate(slot) == (1, 0)


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


def _write_pages(files: SegmentFiles, segment: int, count: int) -> None:
    with files.open(segment, writing=True, direct=False) as fd, open(fd, "wb", closefd=False) as f:
        f.write(b"x" * (count * PAGE_BYTES))


def test_folder_and_files_are_made_for_the_user_only(tmp_path: Path) -> None:
    files = SegmentFiles(tmp_path / "a" / "b")
    _write_pages(files, 0, 1)
    assert files.path(0).parent == tmp_path / "a" / "b"
    assert stat.S_IMODE(files.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(files.path(0).stat().st_mode) == 0o600


def test_punched_hole_reads_as_zeros_and_gives_its_space_back(tmp_path: Path) -> None:
    files = SegmentFiles(tmp_path)
    _write_pages(files, 0, 8)
    before = files.path(0).stat()
    if not files.punch(0, 2 * PAGE_BYTES, 4 * PAGE_BYTES):
        pytest.skip("the file system cannot punch holes")
    after, content = files.path(0).stat(), files.path(0).read_bytes()
    assert after.st_size == before.st_size
    assert after.st_blocks * 512 <= before.st_blocks * 512 - 4 * PAGE_BYTES
    assert content.count(b"x") == content.count(b"\0") == 4 * PAGE_BYTES


def test_segment_that_was_never_written_has_no_space_to_give_back(tmp_path: Path) -> None:
    files = SegmentFiles(tmp_path)
    assert files.punch(7, 0, PAGE_BYTES)
    files.unlink(7)
    assert list(tmp_path.iterdir()) == []


def test_link_in_place_of_a_segment_is_not_followed(tmp_path: Path) -> None:
    files = SegmentFiles(tmp_path / "segments")
    (tmp_path / "target").write_text("keep")
    files.path(0).symlink_to(tmp_path / "target")
    with (
        pytest.raises(StorageError, match="cannot open"),
        files.open(0, writing=True, direct=False),
    ):
        pass
    assert (tmp_path / "target").read_text() == "keep"


def test_segment_that_cannot_be_removed_is_an_error_with_its_path(tmp_path: Path) -> None:
    files = SegmentFiles(tmp_path)
    files.path(3).mkdir()
    with pytest.raises(StorageError, match=f"cannot remove {files.path(3)}"):
        files.unlink(3)


def test_directory_below_a_file_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"cannot use {tmp_path}/file/x: Not a directory"):
        SegmentFiles(tmp_path / "file" / "x")
