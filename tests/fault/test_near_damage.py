"""Disks of workers that are full or damaged, and records or channels that were removed.

What is damaged is refused, never answered wrongly; channels only steer what is read, and are made
again. What is sound can still be read and attended, and the books balance.
"""

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload.errors import CorruptChunk, DiskFull, StorageError
from offload.tiers.near.disk import NearDisk
from offload.tiers.near.sparf_settings import SparF
from offload.types import PAGE_BYTES, Partial
from tests.support.disk import WAIT_S
from tests.support.near import (
    HALF_RECORD,
    LAYOUT,
    SCALE,
    Held,
    check_attends,
    check_reads,
    draw_query,
    exact,
    files_of,
    fill,
    flip,
    held_launcher,
    kill,
    largest_error,
    make_near,
    num_restarts,
    two_workers,
)

SPARF = SparF(LAYOUT.key_dim, 0.25)


@pytest.fixture(scope="module", autouse=True)
def _launcher() -> Iterator[None]:
    with held_launcher():
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[NearDisk]:
    with two_workers(tmp_path) as opened:
        yield opened


def ask_sparsely(disk: NearDisk, held: Held, row: int, how: SparF = SPARF) -> Partial:
    return disk.attend(draw_query()[[row]], held.rows(row), SCALE, how).wait(WAIT_S)


@pytest.mark.parametrize("member", [0, 1])
def test_full_disk_of_one_worker_refuses_the_write_and_nothing_else(
    disk: NearDisk, member: int
) -> None:
    held, pid = fill(disk), disk.members[member].link.pid
    num_free = disk.num_free
    unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (9 * HALF_RECORD + 100, unlimited[1]))
    slots = disk.allocate(2)
    infos, source = held.infos[0][:2], held.buffers[0][:2]
    with pytest.raises(DiskFull) as caught:
        disk.write(slots, infos, source).wait(WAIT_S)
    assert caught.value.errno == errno.EFBIG
    check_attends(disk, held)
    check_reads(disk, held, 0)
    with pytest.raises(CorruptChunk, match="2 of 2 slots hold no record"):
        disk.read(slots, infos, source).wait(WAIT_S)
    disk.free(slots)
    disk.check_integrity()
    assert disk.num_free == num_free
    resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
    again = fill(disk, seed=3)
    check_attends(disk, again)
    check_reads(disk, again, 1)
    assert num_restarts(disk) == [0, 0]


def test_channels_that_find_neither_disk_nor_memory_are_done_without(tmp_path: Path) -> None:
    """Scenario: memory for one chunk, and room on the disk for no block of channels any more."""
    chunk_bytes = 2 * (64 * 32 + 4 * 64)
    with closing(make_near(tmp_path, has_channels=True, memory_bytes=chunk_bytes)) as disk:
        held, pid = fill(disk, 1, 4), disk.members[0].link.pid
        wanted = exact(draw_query()[:1], held.chunks)
        assert largest_error(ask_sparsely(disk, held, 0), wanted) > 1e-3
        assert len(files_of(disk, ".kvchan")) == 3
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (PAGE_BYTES, hard))
        for path in files_of(disk, ".kvchan"):
            path.unlink()
        for _ in range(4):  # each finds at least one block more to be gone
            found = ask_sparsely(disk, held, 0)
        assert largest_error(found, wanted) <= 1e-5
        assert disk.counters()["channel_failed"] > 0
        assert num_restarts(disk) == [0]


@pytest.mark.parametrize("how", [None, SPARF], ids=["dense", "sparf"])
def test_flipped_byte_of_a_record_is_corrupt_for_whoever_asks_about_it(
    disk: NearDisk, how: SparF | None
) -> None:
    held = fill(disk)
    [path] = files_of(disk, ".kvseg", member=1)
    # Row 1 has the odd records; every page of the third chunk's is hit.
    index = int(held.slots[1, 2]) & 0xFFFFFFFF
    start = index * HALF_RECORD + PAGE_BYTES
    pages = range(start + 5, start + LAYOUT.slot_bytes // 2, PAGE_BYTES)
    flip(path, pages)
    query, everything = draw_query()[[1]], SparF(LAYOUT.key_dim, 15 * 16)
    asked = how and everything
    name = held.infos[1][2].chunk_id
    with pytest.raises(CorruptChunk, match=rf"chunk {name} .*checksum"):
        disk.attend(query, held.rows(1), SCALE, asked).wait(WAIT_S)
    with pytest.raises(CorruptChunk, match=rf"chunk {name} .*checksum"):
        check_reads(disk, held, 1)
    check_attends(disk, held, 0)
    check_reads(disk, held, 0)
    flip(path, pages)
    check_attends(disk, held)
    assert num_restarts(disk) == [0, 0]


def test_flipped_header_is_corrupt_for_the_worker_that_takes_over(disk: NearDisk) -> None:
    held = fill(disk)
    [path] = files_of(disk, ".kvseg")
    index = int(held.slots[0, 1]) & 0xFFFFFFFF
    kill(disk.members[0].link)
    flip(path, [index * HALF_RECORD + 20])
    with pytest.raises(CorruptChunk, match=f"chunk {held.infos[0][1].chunk_id} "):
        check_attends(disk, held, 0)
    check_attends(disk, held, 1)


def ask_sound(directory: Path, row: int) -> Partial:
    """Return what a tier says that nothing happened to."""
    with two_workers(directory / "sound") as disk:
        return ask_sparsely(disk, fill(disk), row)


def test_damaged_channels_are_made_again_and_the_answer_is_as_of_sound_ones(
    disk: NearDisk, tmp_path: Path
) -> None:
    held, sound = fill(disk), ask_sound(tmp_path, 0)
    paths = files_of(disk, ".kvchan")
    assert len(paths) == 4
    for path in paths:
        flip(path, range(PAGE_BYTES, path.stat().st_size, 7))
    assert largest_error(ask_sparsely(disk, held, 0), sound) <= 1e-4
    counted = disk.counters()
    assert counted["channel_dropped"] == counted["channel_rebuilt"] == 4
    check_attends(disk, held)
    assert num_restarts(disk) == [0, 0]


def test_channels_damaged_after_they_were_read_change_nothing(disk: NearDisk) -> None:
    held = fill(disk)
    before = ask_sparsely(disk, held, 0)
    for path in files_of(disk, ".kvchan"):
        flip(path, range(PAGE_BYTES, path.stat().st_size, 7))
    assert largest_error(ask_sparsely(disk, held, 0), before) == 0
    assert disk.counters()["channel_dropped"] == 0


def test_worker_that_takes_over_keeps_nothing_and_answers_as_before(disk: NearDisk) -> None:
    held = fill(disk)
    answers = [ask_sparsely(disk, held, 0) for _ in range(2)]
    assert disk.counters()["channel_hits"] > 0
    for member in disk.members:
        kill(member.link)
    answers.append(ask_sparsely(disk, held, 0))
    counted = disk.counters()
    assert counted["channel_hits"] == 0
    assert counted["channel_misses"] > 0
    assert num_restarts(disk) == [1, 1]
    assert [largest_error(found, answers[0]) for found in answers[1:]] == [0, 0]


def test_chunks_that_are_freed_leave_nothing_in_memory(disk: NearDisk) -> None:
    held = fill(disk)
    for row in range(2):
        ask_sparsely(disk, held, row)
    before = disk.counters()["channel_kept_bytes"]
    disk.free(held.flat_slots(0))
    assert 0 < disk.counters()["channel_kept_bytes"] < before
    disk.free(held.flat_slots(1))
    assert disk.counters()["channel_kept_bytes"] == 0


def test_removed_channels_are_made_again_and_the_answer_is_as_of_sound_ones(
    disk: NearDisk, tmp_path: Path
) -> None:
    held, before = fill(disk), ask_sound(tmp_path, 1)
    dense = exact(draw_query()[[1]], held.chunks[[1]])
    for path in files_of(disk, ".kvchan", member=1):
        path.unlink()
    found = ask_sparsely(disk, held, 1)
    # What steers may not all be there yet: then a worker reads everything, for its heads.
    errors = [(found.out - wanted.out).abs().amax(-1) for wanted in (before, dense)]
    assert float(torch.minimum(*errors).max()) <= 1e-4
    assert largest_error(ask_sparsely(disk, held, 1), before) <= 1e-4


def test_channels_of_a_tail_that_died_with_its_worker_are_made_again(tmp_path: Path) -> None:
    with closing(make_near(tmp_path, has_channels=True)) as disk:
        held = fill(disk)
        before = ask_sparsely(disk, held, 0)
        assert files_of(disk, ".kvchan") == []
        kill(disk.members[0].link)
        assert largest_error(ask_sparsely(disk, held, 0), before) <= 1e-6


def test_channels_of_chunks_freed_before_a_worker_died_do_not_stay_for_ever(
    disk: NearDisk,
) -> None:
    """Scenario: one chunk of a block dies, then the worker, and then the other chunk."""
    held = fill(disk, 1, 2)
    slots = held.flat_slots(0)
    assert len(files_of(disk, ".kvchan")) == 1
    disk.free(slots[:1])
    disk.check_integrity()
    kill(disk.members[0].link)
    check_attends(disk, replace(held, slots=held.slots[:, 1:], chunks=held.chunks[:, 1:]))
    disk.free(slots[1:])
    disk.check_integrity()
    assert [files_of(disk, ".kvchan", member) for member in range(2)] == [[], []]


def test_removed_record_file_is_an_error_for_its_layer_alone(disk: NearDisk) -> None:
    held = [fill(disk, layer=layer, seed=layer) for layer in range(2)]
    first, _ = files_of(disk, ".kvseg", member=1)
    first.unlink()
    checks: tuple[Callable[[NearDisk, Held, int], None], ...] = (check_attends, check_reads)
    for check in checks:
        with pytest.raises(StorageError, match=r"cannot open .*: No such file") as caught:
            check(disk, held[0], 1)
        assert caught.value.errno == errno.ENOENT
    check_attends(disk, held[1])
    check_reads(disk, held[1], 0)
    for row in range(2):
        disk.free(held[0].flat_slots(row))
    assert num_restarts(disk) == [0, 0]
