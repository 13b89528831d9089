"""Rows on a disk that is late, fails or lies, with and without a limit on the wait."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.errors import ConfigError, CorruptChunk, StorageError, TransferTimeout
from offload.tiers.disk import DiskTier
from offload.tiers.faults import FaultPlan
from offload.tiers.faulty import FaultyTier
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import page_aligned
from offload.tiers.transfer import Transfer
from offload.types import PAGE_BYTES, ChunkId
from tests.support.disk import WAIT_S, FlakyCall, Gate
from tests.support.rows import HEADS, Shelf, open_shelf, tokens
from tests.support.stores import LAYOUT

SIZE = LAYOUT.chunk_tokens
HEAD_BYTES = LAYOUT.chunk_bytes // LAYOUT.num_kv_heads
EVERY = tokens(*range(0, 6 * SIZE, SIZE))
"""A token of each of six chunks."""


def arm(shelf: Shelf, *, is_armed: bool = True) -> None:
    assert isinstance(shelf.disk, FaultyTier)
    shelf.disk.is_armed = is_armed


def damage(shelf: Shelf, chunk: ChunkId, head: int) -> None:
    """Flip a bit in one head of a chunk's record."""
    tier = shelf.disk.inner if isinstance(shelf.disk, FaultyTier) else shelf.disk
    assert isinstance(tier, DiskTier)
    path, offset, _ = tier.place_of(shelf.store.table[chunk].slots[1])
    at = offset + PAGE_BYTES + head * LAYOUT.chunk_bytes // LAYOUT.num_kv_heads
    with path.open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("deadline_s", [None, WAIT_S])
def test_late_reads_are_waited_for_while_there_is_time(
    deadline_s: float | None, tmp_path: Path
) -> None:
    with open_shelf(tmp_path, 6, faults=FaultPlan(delay=1.0, delay_s=0.002)) as shelf:
        arm(shelf)
        assert shelf.locate(EVERY, deadline_s).all()
        assert shelf.counters.late_rows == 0
        assert shelf.counters.row_wait_s >= 0.002


def test_hung_reads_leave_the_step_in_time_and_arrive_for_a_later_one(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 6, num_buffers=64, faults=FaultPlan(hang=1.0, hang_s=0.5)) as shelf:
        arm(shelf)
        assert not shelf.locate(EVERY, 0.01).any()
        assert shelf.counters.row_wait_s < 0.4
        arm(shelf, is_armed=False)
        shelf.land()
        assert shelf.locate(EVERY, 0.0).all()


def test_hung_read_without_a_deadline_is_a_timeout_that_names_it(tmp_path: Path) -> None:
    gate = Gate()
    preadv = FlakyCall(os.preadv, gate, armed=False)
    with open_shelf(tmp_path, 2, preadv=preadv) as shelf:
        preadv.armed = True
        shelf.store.deadline_s = 0.05
        with pytest.raises(TransferTimeout, match="disk read of parts of 2 chunks"):
            shelf.locate(tokens(0))
        assert shelf.store.table.protected == {shelf.chunks[0]}
        shelf.store.deadline_s = WAIT_S
        gate.open()
        assert shelf.locate(tokens(0)).all()


@pytest.mark.parametrize("deadline_s", [None, WAIT_S])
def test_failed_read_of_a_needed_row_is_an_error_and_can_be_tried_again(
    deadline_s: float | None, tmp_path: Path
) -> None:
    with open_shelf(tmp_path, 6, faults=FaultPlan(fail=1.0)) as shelf:
        arm(shelf)
        with pytest.raises(StorageError, match=r"read of heads|injected"):
            shelf.locate(EVERY, deadline_s)
        arm(shelf, is_armed=False)
        assert shelf.locate(EVERY, deadline_s).all()


def test_failed_prefetch_is_counted_and_the_row_is_read_when_it_is_needed(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 6, faults=FaultPlan(fail=1.0)) as shelf:
        arm(shelf)
        assert shelf.prefetch(EVERY) > 0
        arm(shelf, is_armed=False)
        shelf.land()
        assert shelf.locate(EVERY).all()
        assert shelf.counters.failed_row_reads == 1


@pytest.mark.parametrize("deadline_s", [None, WAIT_S])
def test_corrupt_record_of_a_needed_row_raises_and_the_others_can_be_read(
    deadline_s: float | None, tmp_path: Path
) -> None:
    with open_shelf(tmp_path, 6) as shelf:
        damage(shelf, shelf.chunks[2], head=1)
        with pytest.raises(CorruptChunk, match=r"chunk 2 .*head 1"):
            shelf.locate(EVERY, deadline_s)
        others = tokens(*(t for t in EVERY[0].tolist() if t // SIZE != 2))
        assert shelf.locate(others, deadline_s).all()


def test_corrupt_record_that_comes_too_late_is_counted_and_raises_when_it_is_waited_for(
    tmp_path: Path,
) -> None:
    with open_shelf(tmp_path, 1) as shelf:
        damage(shelf, shelf.chunks[0], head=0)
        assert not shelf.locate(tokens(0), 0.0).any()
        shelf.land()
        assert not shelf.locate(tokens(0), 0.0).any()
        assert shelf.counters.failed_row_reads == 1
        with pytest.raises(CorruptChunk, match="head 0"):
            shelf.locate(tokens(0))


def test_needed_row_is_read_by_itself_when_a_guess_beside_it_is_corrupt(tmp_path: Path) -> None:
    gate = Gate()
    preadv = FlakyCall(os.preadv, gate, armed=False)
    with open_shelf(tmp_path, 6, preadv=preadv) as shelf:
        damage(shelf, shelf.chunks[2], head=1)
        preadv.armed = True
        assert shelf.prefetch(tokens(2 * SIZE, 3 * SIZE)) == 2 * len(HEADS)
        gate.open()
        assert shelf.locate(tokens(3 * SIZE)).all()
        assert shelf.counters.failed_row_reads == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("deadline_s", [None, 0.002])
def test_any_mixture_of_faults_ends_with_right_rows_or_an_error(
    seed: int, deadline_s: float | None, tmp_path: Path
) -> None:
    plan = FaultPlan(seed, delay=0.2, delay_s=0.001, hang=0.1, hang_s=0.01, fail=0.2)
    with open_shelf(tmp_path, 6, num_buffers=5, line_bytes=1 << 10, faults=plan) as shelf:
        arm(shelf)
        answered = 0
        for step in range(20):
            ids = tokens(*((7 * step + 5 * i) % (6 * SIZE) for i in range(6)))
            try:
                found = shelf.locate(ids, deadline_s)
            except StorageError:
                continue
            answered += 1
            assert deadline_s is not None or found.all()
            shelf.prefetch((ids + 1) % (6 * SIZE))
        assert answered > 0
        arm(shelf, is_armed=False)
        assert shelf.locate(EVERY).all()


def test_close_with_a_hung_read_is_a_timeout_and_frees_it_when_the_disk_comes_back(
    tmp_path: Path,
) -> None:
    gate = Gate()
    preadv = FlakyCall(os.preadv, gate, armed=False)
    with open_shelf(tmp_path, 2, preadv=preadv) as shelf:
        preadv.armed = True
        shelf.store.deadline_s = 0.05
        shelf.prefetch(tokens(0))
        assert gate.reached.wait(WAIT_S)
        with pytest.raises(TransferTimeout, match="read of parts"):
            shelf.reader.close()
        shelf.store.deadline_s = WAIT_S
        gate.open()


def buffers_for(count: int) -> list[Tensor]:
    return list(page_aligned(count * HEAD_BYTES).view(count, HEAD_BYTES))


def heads_of(shelf: Shelf, out: list[Tensor]) -> Transfer:
    """Begin to read the last head of the first chunks, one for each buffer."""
    tier, entries = shelf.disk, [shelf.store.table[c] for c in shelf.chunks[: len(out)]]
    assert isinstance(tier, FaultyTier)
    slots, infos = [entry.slots[1] for entry in entries], [entry.info for entry in entries]
    each = tier.parts_per_head
    return tier.read_parts(slots, infos, slice(each, 2 * each), out)


def test_late_read_of_heads_is_not_done_before_its_time_and_brings_them(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 2, faults=FaultPlan(delay=1.0, delay_s=0.1)) as shelf:
        arm(shelf)
        out = buffers_for(2)
        transfer = heads_of(shelf, out)
        assert not transfer.done()
        transfer.wait(WAIT_S)
        for chunk, found in zip(shelf.chunks, out, strict=True):
            expected = shelf.contents[chunk][1].reshape(-1)
            assert torch.equal(found.view(LAYOUT.dtype), expected)


def test_failed_read_of_heads_names_them_and_moves_nothing(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 2, faults=FaultPlan(fail=1.0)) as shelf:
        arm(shelf)
        out = buffers_for(2)
        transfer = heads_of(shelf, out)
        assert transfer.num_bytes == 2 * HEAD_BYTES
        with pytest.raises(StorageError, match="disk read of parts of 2 chunks, first of layer 0"):
            transfer.wait(WAIT_S)
        assert not any(bool(buffer.any()) for buffer in out)


def test_read_of_heads_is_refused_by_a_tier_that_reads_whole_chunks_only() -> None:
    memory = MemoryTier(
        "cpu",
        capacity_bytes=LAYOUT.slot_bytes,
        layout=LAYOUT,
        device=torch.device("cpu"),
    )
    tier = FaultyTier(memory, FaultPlan())
    with pytest.raises(ConfigError, match="the cpu tier reads whole chunks only"):
        tier.read_parts([], [], slice(0, 1), [])
    tier.close()
