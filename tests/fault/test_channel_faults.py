"""The channel-major copy of K on a disk that is full, broken, or tampered with.

Whatever happens, what can be read is right, what cannot be read is missing and can be added again,
and nothing is left behind.
"""

import errno
import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from offload.errors import ClosedError, CorruptChunk, DiskFull, StorageError
from offload.tiers.near.channel_block import BlockFormat
from offload.types import PAGE_BYTES
from tests.support.channels import (
    ALL,
    CHUNK_BYTES,
    LAYOUT,
    TOKEN,
    assert_holds,
    check_against,
    files_of,
    find,
    open_store,
    put,
)
from tests.support.disk import WAIT_S, FlakyCall, Gate, fail_with
from tests.support.full_disks import file_size_limit

FIRST_HEADS = np.zeros((2, 1), np.int64)
FILE_BYTES = BlockFormat(LAYOUT, TOKEN).file_bytes(4)
CODES = BlockFormat(LAYOUT, TOKEN).header_bytes(4)
"""Offset of the codes."""
RUN_BYTES = 4 * LAYOUT.chunk_tokens


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_flipped_code_is_corrupt_and_its_block_can_be_built_again(directory: Path) -> None:
    with closing(open_store(directory)) as store:
        put(store, range(9))
        first, _ = files_of(directory)
        flip(directory / first, CODES + (8 + 5) * RUN_BYTES + 3)
        found = find(store, range(9))
        assert_holds(store, range(9), ALL[:, :5], found=found)  # without the run that is bad
        number = found.blocks[found.block[0]].number
        with pytest.raises(CorruptChunk, match=f"{first}.* block {number}, head 1, channel 5: "):
            store.read(found, ALL)
        assert first not in files_of(directory)
        assert find(store, range(9), found).missing.tolist() == [0, 1, 2, 3]
        put(store, range(4))
        check_against(store, dict.fromkeys(range(9)), unknown=99)
        stats = store.stats()
        assert (stats["dropped"], stats["rebuilt"]) == (4, 4)


def test_all_bad_blocks_of_one_read_are_dropped_at_once(directory: Path) -> None:
    with closing(open_store(directory)) as store:
        put(store, range(16))
        names = files_of(directory)
        for name in names[::2]:
            flip(directory / name, CODES)
        with pytest.raises(CorruptChunk, match="2 of 4 blocks"):
            store.read(find(store, range(16)), FIRST_HEADS)
        assert files_of(directory) == names[1::2]
        assert find(store, range(16)).missing.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


@pytest.mark.parametrize("num_bytes", [0, CODES, CODES + 100])
def test_file_cut_short_under_a_store_is_corrupt(directory: Path, num_bytes: int) -> None:
    with closing(open_store(directory)) as store:
        put(store, range(4))
        [name] = files_of(directory)
        os.truncate(directory / name, num_bytes)
        with pytest.raises(CorruptChunk, match=name):
            store.read(find(store, [2]), ALL)
        assert files_of(directory) == []
        check_against(store, {}, unknown=0)


def test_file_removed_under_a_store_is_corrupt(directory: Path) -> None:
    with closing(open_store(directory)) as store:
        put(store, range(5))
        [name] = files_of(directory)
        (directory / name).unlink()
        with pytest.raises(CorruptChunk, match=f"cannot open .*{name}"):
            store.read(find(store, [4, 2]), ALL)
        check_against(store, {4: None}, unknown=0)


def test_read_error_is_corrupt_and_costs_one_block(directory: Path) -> None:
    preadv = FlakyCall(os.preadv, fail_with(errno.EIO))
    with closing(open_store(directory, preadv=preadv)) as store:
        put(store, range(8))
        with pytest.raises(CorruptChunk, match="Input/output error"):
            store.read(find(store, range(8)), ALL)
        preadv.armed = False
        check_against(store, dict.fromkeys(range(4, 8)), unknown=0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, 200),
        lambda path: os.truncate(path, FILE_BYTES - 1),
        lambda path: os.truncate(path, PAGE_BYTES),
        lambda path: os.truncate(path, 0),
        lambda path: path.rename(path.with_name(f"{TOKEN}-0000000077.kvchan")),
        lambda path: path.rename(path.with_name(path.name + ".tmp")),
    ],
    ids=["flipped", "shorter", "one page", "empty", "renamed", "unfinished"],
)
def test_damaged_file_is_removed_by_the_next_store(
    directory: Path, damage: Callable[[Path], None]
) -> None:
    with closing(open_store(directory)) as store:
        put(store, range(8))
    damage(directory / files_of(directory)[0])
    (directory / "other-0000000000.kvchan.tmp").write_bytes(b"somebody else's")
    with closing(open_store(directory)) as again:
        assert again.stats()["damaged"] == 1
        check_against(again, dict.fromkeys(range(4, 8)), unknown=0)
        put(again, range(4))
        check_against(again, dict.fromkeys(range(8)), unknown=99)
        again.close(remove=True)
    assert files_of(directory) == ["other-0000000000.kvchan.tmp"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_block_that_cannot_be_written_stays_in_memory_until_it_can(
    directory: Path, code: int
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(code))
    with closing(open_store(directory, pwritev=pwritev)) as store:
        put(store, range(4))
        assert (store.stats()["failed"], store.stats()["tail_bytes"]) == (1, 4 * CHUNK_BYTES)
        assert files_of(directory) == []
        check_against(store, dict.fromkeys(range(4)), unknown=99)
        put(store, [4])
        assert store.stats()["failed"] == 2
        pwritev.armed = False
        put(store, range(5, 9))
        assert (store.stats()["blocks"], store.stats()["tail_bytes"]) == (2, CHUNK_BYTES)
        check_against(store, dict.fromkeys(range(9)), unknown=99)


def test_block_that_fails_halfway_leaves_nothing_behind(directory: Path) -> None:
    def move_a_page_then_fail(_: object, offset: int) -> int:
        if offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return PAGE_BYTES

    pwritev = FlakyCall(os.pwritev, move_a_page_then_fail)
    with closing(open_store(directory, pwritev=pwritev)) as store:
        put(store, range(4))
        assert store.stats()["failed"] == 1
        assert files_of(directory) == []


def test_block_beyond_a_limit_on_files_stays_in_memory(directory: Path) -> None:
    with closing(open_store(directory)) as store:
        with file_size_limit(PAGE_BYTES):
            put(store, range(4))
        assert store.stats()["failed"] == 1
        assert files_of(directory) == []
        put(store, [4])
        check_against(store, dict.fromkeys(range(5)), unknown=99)
        assert store.stats()["blocks"] == 1


def test_memory_limit_drops_the_oldest_tail_if_the_disk_is_full(directory: Path) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(errno.ENOSPC))
    with closing(open_store(directory, memory_chunks=5, pwritev=pwritev)) as store:
        put(store, [0, 1], (0, 0))
        put(store, [2, 3, 4], (0, 1))
        put(store, [5], (0, 1))
        check_against(store, dict.fromkeys([2, 3, 4, 5]), unknown=0)
        put(store, range(6, 40), (0, 2))
        assert store.stats()["tail_bytes"] <= 5 * CHUNK_BYTES
        held = store.stats()["tail_bytes"] // CHUNK_BYTES
        assert store.stats()["dropped"] == 40 - held
        check_against(store, dict.fromkeys(range(40 - held, 40)), unknown=0)
        pwritev.armed = False
        put(store, [0, 1])
        assert store.stats()["rebuilt"] == 2
        assert_holds(store, [0, 1])


def test_flush_that_fails_says_so_and_keeps_the_tails(directory: Path) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(errno.ENOSPC))
    with closing(open_store(directory, pwritev=pwritev)) as store:
        put(store, range(3))
        with pytest.raises(DiskFull, match=f"{TOKEN}-"):
            store.flush()
        check_against(store, dict.fromkeys(range(3)), unknown=99)
        pwritev.armed = False
        store.flush()
        assert store.stats()["tail_bytes"] == 0


def test_directory_that_is_gone_is_a_storage_error(directory: Path) -> None:
    with closing(open_store(directory)) as store:
        put(store, range(3))
        directory.rmdir()
        with pytest.raises(StorageError, match="cannot write"):
            store.flush()
        check_against(store, dict.fromkeys(range(3)), unknown=99)


@pytest.mark.parametrize("forgotten", [[0], [1, 2], [0, 1, 2, 3]])
def test_chunk_forgotten_while_its_block_is_written_stays_forgotten(
    directory: Path, forgotten: list[int]
) -> None:
    gate = Gate()
    pwritev = FlakyCall(os.pwritev, lambda *_: gate())
    with closing(open_store(directory, pwritev=pwritev)) as store:
        thread = threading.Thread(target=put, args=(store, range(4)))
        thread.start()
        assert gate.reached.wait(WAIT_S)
        check_against(store, dict.fromkeys(range(4)), unknown=99)
        store.forget(forgotten)
        put(store, forgotten[:1], (9, 9))
        gate.open()
        thread.join()
        alive = {0, 1, 2, 3}.difference(forgotten[1:])
        check_against(store, dict.fromkeys(alive), unknown=99)
        assert len(files_of(directory)) == (len(forgotten) < 4)
        assert store.stats()["tail_bytes"] == CHUNK_BYTES


def test_chunk_that_comes_while_its_lane_is_written_waits_for_the_next_block(
    directory: Path,
) -> None:
    gate = Gate()
    pwritev = FlakyCall(os.pwritev, lambda *_: gate())
    with closing(open_store(directory, pwritev=pwritev)) as store:
        threads = [threading.Thread(target=put, args=(store, slots)) for slots in (range(4), [4])]
        threads[0].start()
        assert gate.reached.wait(WAIT_S)
        threads[1].start()
        gate.open()
        for thread in threads:
            thread.join()
        assert (store.stats()["blocks"], store.stats()["tail_bytes"]) == (1, CHUNK_BYTES)
        check_against(store, dict.fromkeys(range(5)), unknown=99)


def test_close_waits_for_the_block_that_is_being_written(directory: Path) -> None:
    gate = Gate()
    store = open_store(directory, pwritev=FlakyCall(os.pwritev, lambda *_: gate()))
    adding = threading.Thread(target=put, args=(store, range(4)))
    adding.start()
    assert gate.reached.wait(WAIT_S)
    closing_ = threading.Thread(target=store.close, kwargs={"remove": True})
    closing_.start()
    gate.open()
    adding.join()
    closing_.join()
    assert files_of(directory) == []
    with pytest.raises(ClosedError):
        put(store, [9])
