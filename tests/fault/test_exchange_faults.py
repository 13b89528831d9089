"""Exchanges on a disk that is full, late, broken or lies: chunks stay where they were."""

import errno
import os
from pathlib import Path

import pytest

from offload.errors import CorruptChunk, TransferTimeout
from offload.tiers.disk import DiskTier
from offload.tiers.faults import FaultPlan
from offload.types import PAGE_BYTES
from tests.support.disk import WAIT_S, FlakyCall, Gate, fail_with
from tests.support.exchanges import open_exchanges
from tests.support.stores import check

HOT = {0: 0.2, 1: 0.2, 6: 0.3, 7: 0.3}
"""Of eight chunks, of which the first four are in memory; 2 and 3 get nothing."""


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failed_write_leaves_both_chunks_where_they_were_and_the_next_try_moves_them(
    code: int, tmp_path: Path
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(code), armed=False)
    with open_exchanges(tmp_path, 8, pwritev=pwritev) as found:
        pwritev.armed = True
        used = found.store.tiers[-1].used_bytes
        found.run(HOT)
        assert found.in_memory == {0, 1, 2, 3}
        assert found.counters.failed_exchanges == 2
        assert found.store.tiers[-1].used_bytes == used
        pwritev.armed = False
        found.run(HOT, rounds=8)
        assert found.in_memory == {0, 1, 6, 7}


def test_failed_read_leaves_both_chunks_where_they_were_and_the_next_try_moves_them(
    tmp_path: Path,
) -> None:
    with open_exchanges(tmp_path, 8, faults=FaultPlan(fail=1.0)) as found:
        found.arm()
        found.observe(HOT)
        found.exchange.settle()
        assert found.in_memory == {0, 1, 2, 3}
        assert found.counters.failed_exchanges == 2
        found.arm(is_armed=False)
        found.run(HOT, rounds=8)
        assert found.in_memory == {0, 1, 6, 7}


def test_full_disk_is_counted_and_nothing_moves(tmp_path: Path) -> None:
    with open_exchanges(tmp_path, 8, disk_slots=4) as found:
        found.run(HOT, rounds=3)
        assert found.in_memory == {0, 1, 2, 3}
        assert found.counters.failed_exchanges > 0
        assert found.store.tiers[-1].num_free == 0


def test_second_copies_make_room_on_a_full_disk_for_chunks_that_leave(tmp_path: Path) -> None:
    with open_exchanges(tmp_path, 8, disk_slots=5, most=1) as found:
        found.run(HOT, rounds=20)
        assert found.in_memory == {0, 1, 6, 7}


def test_corrupt_chunk_stays_on_the_disk_and_is_an_error_for_who_needs_it(tmp_path: Path) -> None:
    with open_exchanges(tmp_path, 8) as found:
        disk, chunk = found.store.tiers[-1], found.chunks[6]
        assert isinstance(disk, DiskTier)
        path, offset, _ = disk.place_of(found.store.table[chunk].slots[1])
        with path.open("r+b") as file:
            file.seek(offset + PAGE_BYTES)
            file.write(b"damaged")
        found.contents.pop(chunk)
        found.exchange.observe({chunk: 0.9})
        found.exchange.settle()
        assert found.counters.failed_exchanges == 1
        assert found.store.level_of(chunk) == 1
        with pytest.raises(CorruptChunk):
            found.store.read_chunk(chunk)
        found.store.release([chunk])


def test_late_read_is_not_waited_for_by_rounds_and_is_a_timeout_for_who_settles(
    tmp_path: Path,
) -> None:
    gate = Gate()
    preadv = FlakyCall(os.preadv, gate, armed=False)
    with open_exchanges(tmp_path, 8, preadv=preadv) as found:
        preadv.armed = True
        for _ in range(3):
            found.observe(HOT)
        assert found.in_memory == {0, 1, 2, 3}
        found.store.deadline_s = 0.05
        with pytest.raises(TransferTimeout, match="read of parts"):
            found.exchange.settle()
        found.store.deadline_s = WAIT_S
        gate.open()
        found.exchange.settle()
        assert found.in_memory == {0, 1, 6, 7}


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_of_faults_loses_nothing(seed: int, tmp_path: Path) -> None:
    plan = FaultPlan(seed, delay=0.2, delay_s=0.001, fail=0.4)
    with open_exchanges(tmp_path, 16, faults=plan) as found:
        for step in range(40):
            found.arm()
            found.observe({(3 * step + i) % 16: 0.1 * (1 + i) for i in range(5)})
            found.exchange.settle()
            found.arm(is_armed=False)
            check(found.store, found.contents)
        assert found.counters.failed_exchanges > 0
        assert found.counters.promoted_chunks > 0
