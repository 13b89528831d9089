"""The disk tier on a disk that is full, broken, slow, or tampered with.

After each fault: what was written before can still be read, what failed cannot, and the slots add
up. That no thread and no descriptor is left is checked around every test of this folder.
"""

import errno
import fcntl
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch

from offload.errors import (
    CorruptChunk,
    DiskFull,
    StorageError,
)
from offload.tiers import segment_files
from offload.types import PAGE_BYTES
from tests.contracts.tier_contract import WHOLE_PAGES, make_buffers, make_infos, same_chunks
from tests.support.disk import (
    WAIT_S,
    FlakyCall,
    assert_unreadable_and_freeable,
    fail_with,
    make_disk_tier,
    read_records,
    write_records,
)
from tests.support.full_disks import file_size_limit, small_file_system

_RECORD = PAGE_BYTES + WHOLE_PAGES.slot_bytes


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.mark.parametrize("room", [4 * _RECORD, 4 * _RECORD + 100, 5 * _RECORD - 1])
def test_write_beyond_the_file_size_limit_is_disk_full_and_keeps_older_records(
    directory: Path, room: int
) -> None:
    with closing(make_disk_tier(directory, 20, WHOLE_PAGES, records_per_segment=20)) as tier:
        slots, infos, source = write_records(tier, 4)
        failed, failed_infos = tier.allocate(3), make_infos(3, first_id=4)
        buffers = make_buffers(3, WHOLE_PAGES, seed=2)
        with file_size_limit(room), pytest.raises(DiskFull) as caught:
            tier.write(failed, failed_infos, buffers).wait(WAIT_S)
        assert caught.value.errno == errno.EFBIG
        assert same_chunks(read_records(tier, slots, infos), source, WHOLE_PAGES)
        assert_unreadable_and_freeable(tier, failed, failed_infos)
        again = write_records(tier, 3, first_id=7, seed=3)
        assert same_chunks(read_records(tier, *again[:2]), again[2], WHOLE_PAGES)
    assert list(directory.iterdir()) == []


def test_full_file_system_is_disk_full_and_works_again_once_there_is_room(directory: Path) -> None:
    with (
        small_file_system(directory, 8 * _RECORD),
        closing(make_disk_tier(directory, 100, WHOLE_PAGES)) as tier,
    ):
        slots, infos, source = write_records(tier, 5)
        failed, failed_infos = tier.allocate(9), make_infos(9, first_id=5)
        with pytest.raises(DiskFull) as caught:
            tier.write(failed, failed_infos, make_buffers(9, WHOLE_PAGES, seed=2)).wait(WAIT_S)
        assert caught.value.errno == errno.ENOSPC
        assert same_chunks(read_records(tier, slots, infos), source, WHOLE_PAGES)
        tier.free(failed)
        tier.check_integrity()
        again = write_records(tier, 2, first_id=14, seed=3)
        assert same_chunks(read_records(tier, *again[:2]), again[2], WHOLE_PAGES)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_write_that_fails_halfway_publishes_nothing_of_that_operation(
    directory: Path, code: int
) -> None:
    def move_one_record_then_fail(_: object, offset: int) -> int:
        if offset:
            raise OSError(code, os.strerror(code))
        return _RECORD

    pwritev = FlakyCall(os.pwritev, move_one_record_then_fail)
    with closing(make_disk_tier(directory, 8, WHOLE_PAGES, pwritev=pwritev)) as tier:
        slots, infos = tier.allocate(3), make_infos(3)
        source = make_buffers(3, WHOLE_PAGES, seed=1)
        with pytest.raises(StorageError) as caught:
            tier.write(slots, infos, source).wait(WAIT_S)
        assert caught.value.errno == code
        assert isinstance(caught.value, DiskFull) == (code != errno.EIO)
        assert_unreadable_and_freeable(tier, slots, infos)
        assert list(directory.iterdir()) == []


def test_slot_whose_second_write_failed_is_not_readable_with_its_first_content(
    directory: Path,
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(errno.EIO), armed=False)
    with closing(make_disk_tier(directory, 8, WHOLE_PAGES, pwritev=pwritev)) as tier:
        slots, infos, source = write_records(tier, 2)
        pwritev.armed = True
        with pytest.raises(StorageError):
            tier.write(slots[:1], infos[:1], source[1:]).wait(WAIT_S)
        assert same_chunks(read_records(tier, slots[1:], infos[1:]), source[1:], WHOLE_PAGES)
        assert_unreadable_and_freeable(tier, slots[:1], infos[:1])


def test_read_error_is_reported_and_the_record_can_be_read_later(directory: Path) -> None:
    preadv = FlakyCall(os.preadv, fail_with(errno.EIO))
    with closing(make_disk_tier(directory, 8, WHOLE_PAGES, preadv=preadv)) as tier:
        slots, infos, source = write_records(tier, 2)
        with pytest.raises(StorageError, match=r"read of \d+ bytes at offset 0") as caught:
            read_records(tier, slots, infos)
        assert caught.value.errno == errno.EIO
        assert not isinstance(caught.value, CorruptChunk)
        preadv.armed = False
        assert same_chunks(read_records(tier, slots, infos), source, WHOLE_PAGES)
        assert tier.num_free == 6


@pytest.mark.parametrize("limit", [PAGE_BYTES, _RECORD, _RECORD + PAGE_BYTES])
def test_short_reads_and_writes_still_move_every_byte(directory: Path, limit: int) -> None:
    preadv = FlakyCall(os.preadv, lambda *_: limit)
    pwritev = FlakyCall(os.pwritev, lambda *_: limit)
    tier = make_disk_tier(directory, 8, WHOLE_PAGES, preadv=preadv, pwritev=pwritev)
    with closing(tier):
        slots, infos, source = write_records(tier, 3)
        assert same_chunks(read_records(tier, slots, infos), source, WHOLE_PAGES)


def test_call_that_is_refused_with_direct_io_goes_through_the_page_cache(directory: Path) -> None:
    direct_calls = 0

    def refuse_direct(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        nonlocal direct_calls
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            direct_calls += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return os.preadv(fd, buffers, offset)

    with closing(make_disk_tier(directory, 8, WHOLE_PAGES, preadv=refuse_direct)) as tier:
        slots, infos, source = write_records(tier, 2)
        assert same_chunks(read_records(tier, slots, infos), source, WHOLE_PAGES)
        assert direct_calls == int(tier.is_direct)


def test_read_that_ends_early_is_corrupt_and_says_how_much_is_missing(directory: Path) -> None:
    preadv = FlakyCall(os.preadv, lambda *_: 0)
    with closing(make_disk_tier(directory, 8, WHOLE_PAGES, preadv=preadv)) as tier:
        slots, infos, _ = write_records(tier, 1)
        with pytest.raises(CorruptChunk, match=f"ends {_RECORD} bytes too early"):
            read_records(tier, slots, infos)


@pytest.mark.parametrize("cut", [1, PAGE_BYTES, _RECORD - 1, _RECORD])
def test_truncated_file_is_corrupt_and_the_records_before_the_cut_are_not(
    directory: Path, cut: int
) -> None:
    with closing(make_disk_tier(directory, 8, WHOLE_PAGES)) as tier:
        slots, infos, source = write_records(tier, 3)
        [file] = directory.iterdir()
        os.truncate(file, 3 * _RECORD - cut)
        with pytest.raises(CorruptChunk, match=f"ends {cut} bytes too early"):
            read_records(tier, slots[2:], infos[2:])
        with pytest.raises(CorruptChunk):
            read_records(tier, slots, infos)
        assert same_chunks(read_records(tier, slots[:2], infos[:2]), source[:2], WHOLE_PAGES)


def _flip(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize(
    "position",
    [0, 40, 3000, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 777, _RECORD - 1],
)
def test_flipped_byte_is_corrupt_and_the_neighbours_are_not(directory: Path, position: int) -> None:
    with closing(make_disk_tier(directory, 8, WHOLE_PAGES)) as tier:
        slots, infos, source = write_records(tier, 3)
        [file] = directory.iterdir()
        _flip(file, _RECORD + position)
        with pytest.raises(CorruptChunk, match=r"chunk 1 \(layer 0, token 64\)"):
            read_records(tier, slots, infos)
        good = [0, 2]
        out = read_records(tier, [slots[i] for i in good], [infos[i] for i in good])
        assert same_chunks(out, [source[i] for i in good], WHOLE_PAGES)


def test_flipped_byte_in_one_head_leaves_the_other_heads_readable(directory: Path) -> None:
    head_bytes = WHOLE_PAGES.chunk_bytes // 2
    with closing(make_disk_tier(directory, 8, WHOLE_PAGES)) as tier:
        slots, infos, source = write_records(tier, 1)
        [file] = directory.iterdir()
        _flip(file, PAGE_BYTES + 5)
        each = tier.parts_per_head
        out = torch.zeros(head_bytes, dtype=torch.uint8)
        with pytest.raises(CorruptChunk, match="first of head 0"):
            tier.read_parts(slots, infos, [0], [out], num_parts=each).wait(WAIT_S)
        tier.read_parts(slots, infos, [each], [out], num_parts=each).wait(WAIT_S)
        assert torch.equal(out, source[0][head_bytes : 2 * head_bytes])


def test_record_in_the_place_of_another_is_corrupt(directory: Path) -> None:
    with closing(make_disk_tier(directory, 8, WHOLE_PAGES)) as tier:
        slots, infos, _ = write_records(tier, 2)
        [file] = directory.iterdir()
        content = file.read_bytes()
        file.write_bytes(content[_RECORD:] + content[:_RECORD])
        with pytest.raises(CorruptChunk, match="first_token should be 0, the record has 64"):
            read_records(tier, slots[:1], infos[:1])


def test_missing_file_is_a_storage_error_with_its_path(directory: Path) -> None:
    with closing(make_disk_tier(directory, 8, WHOLE_PAGES)) as tier:
        slots, infos, _ = write_records(tier, 1)
        [file] = directory.iterdir()
        file.unlink()
        with pytest.raises(StorageError, match=str(file)) as caught:
            read_records(tier, slots, infos)
        assert caught.value.errno == errno.ENOENT
        tier.free(slots)
        tier.check_integrity()


def test_file_system_without_holes_counts_dead_records_until_their_segment_dies(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_files, "punch_hole", lambda *_: errno.EOPNOTSUPP)
    with closing(make_disk_tier(directory, 6, WHOLE_PAGES)) as tier:
        slots, infos, source = write_records(tier, 6)
        tier.free(slots[:2])
        tier.check_integrity()
        assert (tier.num_free, tier.used_bytes) == (0, tier.capacity_bytes)
        tier.free(slots[2:3])
        tier.check_integrity()
        assert tier.num_free == 3
        assert len(list(directory.iterdir())) == 1
        assert same_chunks(read_records(tier, slots[3:], infos[3:]), source[3:], WHOLE_PAGES)
