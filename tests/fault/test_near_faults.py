"""Workers that die or hang: what was asked of them is answered rightly, or refused.

Nothing is ever answered wrongly. After each fault the books balance, and what is sound can still be
read and attended. That no thread and no descriptor is left is checked around every test here.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.errors import ClosedError, StorageError, TransferTimeout
from offload.tiers.near.disk import NearDisk
from offload.tiers.near.messages import Adopt, Ask, Body
from offload.tiers.pool import page_aligned
from offload.tiers.transfer import FutureTransfer
from tests.support.disk import WAIT_S
from tests.support.near import (
    IMPATIENT_S,
    LAYOUT,
    SCALE,
    Held,
    check_attends,
    check_reads,
    draw_query,
    exact,
    fill,
    hang,
    held_launcher,
    kill,
    largest_error,
    make_near,
    num_restarts,
    stop,
    two_workers,
    wait_gone,
)


@pytest.fixture(scope="module", autouse=True)
def _launcher() -> Iterator[None]:
    with held_launcher():
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[NearDisk]:
    with two_workers(tmp_path) as opened:
        yield opened


Finish = Callable[[], None]
"""Waits for something that was begun, and checks what came of it."""


def begin_attend(disk: NearDisk, held: Held) -> Finish:
    query = draw_query()
    call = disk.attend(query, held.rows(), SCALE)

    def finish() -> None:
        assert largest_error(call.wait(WAIT_S), exact(query, held.chunks)) <= 1e-5

    return finish


def begin_read(disk: NearDisk, held: Held) -> Finish:
    out = [page_aligned(LAYOUT.slot_bytes) for _ in held.buffers[0]]
    transfer = disk.read(held.flat_slots(0), held.infos[0], out)

    def finish() -> None:
        transfer.wait(WAIT_S)
        assert all(map(torch.equal, out, held.buffers[0]))

    return finish


def begin_write(disk: NearDisk, held: Held) -> Finish:
    """Write a row once more, as that of another layer."""
    slots = disk.allocate(len(held.infos[0]), stream=5)
    infos = [replace(info, layer=5) for info in held.infos[0]]
    transfer = disk.write(slots, infos, held.buffers[0])
    written = Held([infos], np.array([slots], np.int64), held.buffers[:1], held.chunks[:1])

    def finish() -> None:
        transfer.wait(WAIT_S)
        check_reads(disk, written, 0)
        check_attends(disk, written)

    return finish


BEGIN = {"attend": begin_attend, "read": begin_read, "write": begin_write}
USES = list(BEGIN)


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("use", USES)
def test_request_under_way_when_its_worker_is_killed_is_answered_by_the_next_one(
    disk: NearDisk, use: str, member: int
) -> None:
    held, link = fill(disk), disk.members[member].link
    stop(link)
    finish = BEGIN[use](disk, held)
    kill(link)
    finish()
    check_attends(disk, held)
    check_reads(disk, held, 1)
    assert num_restarts(disk) == [int(number == member) for number in range(2)]


@pytest.mark.parametrize("use", USES)
def test_worker_that_hangs_is_killed_and_its_request_answered_by_the_next_one(
    disk: NearDisk, use: str
) -> None:
    held, link = fill(disk), disk.members[1].link
    hung = link.pid
    hang(link)
    BEGIN[use](disk, held)()
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
    assert isinstance(writing, FutureTransfer)
    writing._futures[0].result(WAIT_S)
    written = replace(source, slots=np.array([slots], np.int64))
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
            finish = BEGIN[USES[(number + turn) % 3]](disk, held[number])
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
    is_begun = threading.Event()

    def one_more() -> None:
        is_begun.set()
        disk.attend(draw_query(), held.rows(), SCALE)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one_more)
        assert is_begun.wait(WAIT_S)
        disk.close()
        with pytest.raises(ClosedError):
            waiting.result(WAIT_S)
    for call in calls:
        with pytest.raises(ClosedError, match="closed"):
            call.wait(WAIT_S)
    assert not any(path.is_file() for path in tmp_path.rglob("worker-*/*"))
