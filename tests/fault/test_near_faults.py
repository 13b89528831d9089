"""Workers that die, hang, or find their disk full or damaged: answered rightly, or refused.

Nothing is ever answered wrongly. After each fault the books balance, and what is sound can still be
read and attended. That no thread and no descriptor is left is checked around every test here.
"""

import errno
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload.errors import ClosedError, CorruptChunk, DiskFull, StorageError, TransferTimeout
from offload.tiers.near.disk import NearDisk
from offload.tiers.near.messages import Adopt, Ask, Body
from offload.tiers.near.sparf_settings import SparF
from offload.tiers.pool import page_aligned
from offload.types import PAGE_BYTES, Partial
from tests.support.disk import WAIT_S, Gate
from tests.support.near import (
    IMPATIENT_S,
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
    hang,
    held_launcher,
    kill,
    largest_error,
    make_near,
    num_restarts,
    stop,
    wait_gone,
)

HALF_RECORD = PAGE_BYTES + LAYOUT.slot_bytes // 2
"""What each of two workers writes of a chunk."""

SPARF = SparF(LAYOUT.key_dim, 0.25)


@pytest.fixture(scope="module", autouse=True)
def _launcher() -> Iterator[None]:
    with held_launcher():
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[NearDisk]:
    """Two workers with channels, a block of which is full after two chunks."""
    opened = make_near(tmp_path, num_paths=2, has_channels=True, block_tokens=128)
    with closing(opened):
        yield opened
        opened.check_integrity()


def begin(disk: NearDisk, held: Held, use: str) -> Callable[[], object]:
    """Begin something; what is returned waits for it, and checks it."""
    if use == "attend":
        query = draw_query()
        call = disk.attend(query, held.rows(), SCALE)
        wanted = exact(query, held.chunks)
        return lambda: largest_error(call.wait(WAIT_S), wanted) <= 1e-5 or pytest.fail("wrong")
    if use == "read":
        out = [page_aligned(LAYOUT.slot_bytes) for _ in held.buffers[0]]
        reading = disk.read(held.flat_slots(0), held.infos[0], out)
        return lambda: reading.wait(WAIT_S)
    slots = disk.allocate(4)
    infos = [replace(info, layer=5) for info in held.infos[0]]
    writing = disk.write(slots, infos, held.buffers[0])

    def check() -> None:
        writing.wait(WAIT_S)
        written = Held([infos], held.slots[:1].copy(), held.buffers[:1], held.chunks[:1])
        written.slots[0] = slots
        check_reads(disk, written, 0)
        check_attends(disk, written)

    return check


def ask_sparsely(disk: NearDisk, held: Held, row: int, how: SparF = SPARF) -> Partial:
    return disk.attend(draw_query()[[row]], held.rows(row), SCALE, how).wait(WAIT_S)


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("use", ["attend", "read", "write"])
def test_request_under_way_when_its_worker_is_killed_is_answered_by_the_next_one(
    disk: NearDisk, use: str, member: int
) -> None:
    held, link = fill(disk), disk.members[member].link
    stop(link)
    finish = begin(disk, held, use)
    kill(link)
    finish()
    check_attends(disk, held)
    check_reads(disk, held, 1)
    assert num_restarts(disk) == [int(number == member) for number in range(2)]


@pytest.mark.parametrize("use", ["attend", "read", "write"])
def test_worker_that_hangs_is_killed_and_its_request_answered_by_the_next_one(
    disk: NearDisk, use: str
) -> None:
    held, link = fill(disk), disk.members[1].link
    hung = link.pid
    hang(link)
    begin(disk, held, use)()
    assert link.pid != hung
    assert num_restarts(disk) == [0, 1]


def test_request_over_which_two_workers_hang_names_the_worker_and_the_tier_goes_on(
    disk: NearDisk,
) -> None:
    held, link = fill(disk), disk.members[0].link

    def make(_: object) -> Body:
        link._patience_s = IMPATIENT_S
        stop(link)
        return Ask()

    hang(link)
    asked = link.ask("disk: counters", make)
    with pytest.raises(
        TransferTimeout, match=r"counters: storage worker 0 on .*path-0 was killed.*, 2 times"
    ):
        asked.result(WAIT_S)
    check_attends(disk, held)
    assert num_restarts(disk) == [2, 0]


def test_request_over_which_two_workers_die_is_given_up_and_the_tier_goes_on(
    disk: NearDisk,
) -> None:
    held, link, asked = fill(disk), disk.members[1].link, []

    def die(_: object) -> Body:
        asked.append(link.pid)
        kill(link)
        return Ask()

    with pytest.raises(StorageError, match=r"counters: storage worker 1 on .*path-1 died, 2 times"):
        link.ask("disk: counters", die).result(WAIT_S)
    assert len(set(asked)) == 2
    check_attends(disk, held)
    check_reads(disk, held, 0)
    assert num_restarts(disk) == [0, 2]


def test_worker_killed_while_it_is_being_told_of_its_records_is_replaced(disk: NearDisk) -> None:
    held, link = fill(disk), disk.members[0].link
    adopt, is_first, is_over = link._adopt, [True], threading.Event()

    def die_first() -> Adopt:
        if is_first:
            is_first.clear()
            kill(link)
            wait_gone([link.pid])
        else:
            is_over.set()
        return adopt()

    link._adopt = die_first
    kill(link)
    assert is_over.wait(WAIT_S)
    check_attends(disk, held)
    assert num_restarts(disk) == [2, 0]


def test_chunk_that_one_worker_wrote_before_it_died_and_the_other_after_can_be_attended(
    disk: NearDisk,
) -> None:
    """Scenario: a worker answers, dies, and its successor is told what is stored: not yet all."""
    first, second = (member.link for member in disk.members)
    slots, source = disk.allocate(4), fill(disk, 1, 4)
    stop(second)
    writing = disk.write(slots, source.infos[0], source.buffers[0])
    first.ask("disk: counters", lambda _: Ask()).result(WAIT_S)
    written = replace(source, slots=source.slots.copy())
    written.slots[0] = slots
    while files_of(disk, ".kvseg")[0].stat().st_size < 8 * HALF_RECORD:
        first.ask("disk: counters", lambda _: Ask()).result(WAIT_S)
    kill(first)
    first.ask("disk: counters", lambda _: Ask()).result(WAIT_S)
    assert not writing.done()
    os.kill(second.pid, signal.SIGCONT)
    writing.wait(WAIT_S)
    check_attends(disk, written)
    assert num_restarts(disk) == [1, 0]


def test_calls_of_four_threads_are_answered_rightly_while_workers_are_killed(
    disk: NearDisk,
) -> None:
    held = [fill(disk, layer=layer, seed=layer) for layer in range(4)]
    begun, rounds = threading.Barrier(5), 3

    def use(number: int) -> None:
        for turn in range(rounds):
            uses = ("attend", "read", "write")
            finish = begin(disk, held[number], uses[(number + turn) % 3])
            begun.wait(WAIT_S)
            finish()
            check_attends(disk, held[number])
            begun.wait(WAIT_S)

    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(use, number) for number in range(4)]
        for turn in range(rounds):
            link = disk.members[turn % 2].link
            stop(link)
            begun.wait(WAIT_S)
            kill(link)
            begun.wait(WAIT_S)
        for thread in threads:
            thread.result(WAIT_S)
    assert num_restarts(disk) == [2, 1]


def test_tier_closed_under_a_hung_worker_ends_all_calls_with_closed_error(tmp_path: Path) -> None:
    disk = make_near(tmp_path, num_paths=2)
    held = fill(disk)
    for member in disk.members:
        stop(member.link)
    # Of the frames for calls there are four: the fifth waits for one.
    calls = [disk.attend(draw_query(), held.rows(), SCALE) for _ in range(4)]
    reached = Gate()
    reached.open()

    def one_more() -> None:
        reached()
        disk.attend(draw_query(), held.rows(), SCALE)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one_more)
        assert reached.reached.wait(WAIT_S)
        disk.close()
        with pytest.raises(ClosedError):
            waiting.result(WAIT_S)
    for call in calls:
        with pytest.raises(ClosedError, match="closed"):
            call.wait(WAIT_S)
    assert not any(path.is_file() for path in tmp_path.rglob("worker-*/*"))


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


def test_damaged_channels_are_made_again_and_the_answer_is_as_before(disk: NearDisk) -> None:
    held = fill(disk)
    before = ask_sparsely(disk, held, 0)
    paths = files_of(disk, ".kvchan")
    assert len(paths) == 4
    for path in paths:
        flip(path, range(PAGE_BYTES, path.stat().st_size, 7))
    assert largest_error(ask_sparsely(disk, held, 0), before) <= 1e-4
    counted = disk.counters()
    assert counted["channel_dropped"] == counted["channel_rebuilt"] == 4
    check_attends(disk, held)
    assert num_restarts(disk) == [0, 0]


def test_removed_channels_are_made_again_and_the_answer_is_as_before(disk: NearDisk) -> None:
    held = fill(disk)
    before, dense = ask_sparsely(disk, held, 1), exact(draw_query()[[1]], held.chunks[[1]])
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
    for check in (lambda: check_attends(disk, held[0]), lambda: check_reads(disk, held[0], 1)):
        with pytest.raises(StorageError, match=r"cannot open .*: No such file") as caught:
            check()
        assert caught.value.errno == errno.ENOENT
    check_attends(disk, held[1])
    check_reads(disk, held[1], 0)
    for row in range(2):
        disk.free(held[0].flat_slots(row))
    assert num_restarts(disk) == [0, 0]
