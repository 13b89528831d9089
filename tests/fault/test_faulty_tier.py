"""Each kind of injected fault: what is raised, where the chunk is afterwards, what was counted.

That no thread and no descriptor is left is checked around every test of this folder.
"""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from offload.errors import (
    ClosedError,
    ConfigError,
    CorruptChunk,
    DiskFull,
    StorageError,
    TransferCancelled,
    TransferTimeout,
)
from offload.tiers.faults import FaultCounts, FaultPlan
from offload.tiers.faulty import FaultyTier
from offload.tiers.memory import MemoryTier
from offload.types import ChunkInfo, SlotId
from tests.contracts.tier_contract import WHOLE_PAGES, make_buffers, make_infos, same_chunks
from tests.support.disk import WAIT_S, FlakyCall, Gate, make_disk_tier

_LONG_S = 3600.0
"""A delay that ends a test by its timeout, unless something ends it earlier."""

MakeTier = Callable[..., FaultyTier]


@pytest.fixture
def new_tier(tmp_path: Path) -> Iterator[MakeTier]:
    """Make faulty disk tiers of 8 slots that are closed, without a trace, when the test is over."""
    tiers: list[FaultyTier] = []

    def make(plan: FaultPlan, **options: object) -> FaultyTier:
        folder = tmp_path / f"disk-{len(tiers)}"
        disk = make_disk_tier(folder, 8, WHOLE_PAGES, **options)  # type: ignore[arg-type]
        tiers.append(FaultyTier(disk, plan))
        return tiers[-1]

    yield make
    for i, tier in enumerate(tiers):
        tier.check_integrity()
        tier.close()
        assert list((tmp_path / f"disk-{i}").iterdir()) == []


def make_memory_tier() -> MemoryTier:
    size = 8 * WHOLE_PAGES.slot_bytes
    return MemoryTier("cpu", capacity_bytes=size, layout=WHOLE_PAGES, device=torch.device("cpu"))


def store(
    tier: FaultyTier, n: int, *, first_id: int = 0
) -> tuple[list[SlotId], list[ChunkInfo], list[torch.Tensor]]:
    """Write ``n`` records in one transfer, armed or not as the tier is."""
    infos, source = make_infos(n, first_id=first_id), make_buffers(n, WHOLE_PAGES, seed=n)
    slots = tier.allocate(n)
    tier.write(slots, infos, source).wait(WAIT_S)
    return slots, infos, source


def store_soundly(
    tier: FaultyTier, n: int
) -> tuple[list[SlotId], list[ChunkInfo], list[torch.Tensor]]:
    tier.is_armed = False
    try:
        return store(tier, n)
    finally:
        tier.is_armed = True


def load(tier: FaultyTier, slots: list[SlotId], infos: list[ChunkInfo]) -> list[torch.Tensor]:
    out = make_buffers(len(slots), WHOLE_PAGES)
    tier.read(slots, infos, out).wait(WAIT_S)
    return out


def test_failed_read_is_an_input_output_error_and_the_record_is_still_there(
    new_tier: MakeTier,
) -> None:
    tier = new_tier(FaultPlan(fail=1.0))
    slots, infos, source = store_soundly(tier, 2)
    transfer = tier.read(slots, infos, make_buffers(2, WHOLE_PAGES))
    assert transfer.done()
    assert not transfer.cancel()
    with pytest.raises(StorageError, match=r"disk read of 2 chunks, first of layer 0 from token 0"):
        transfer.wait(WAIT_S)
    with pytest.raises(StorageError) as caught:
        transfer.wait(0)
    assert caught.value.errno == errno.EIO
    tier.is_armed = False
    assert same_chunks(load(tier, slots, infos), source, WHOLE_PAGES)
    assert tier.counts == FaultCounts(fail=1)


@pytest.mark.parametrize(
    ("plan", "error", "code", "counts"),
    [
        (FaultPlan(fail=1.0), StorageError, errno.EIO, FaultCounts(fail=1)),
        (FaultPlan(full=1.0), DiskFull, errno.ENOSPC, FaultCounts(full=1)),
    ],
    ids=["fail", "full"],
)
def test_failed_write_leaves_no_record_and_a_slot_that_can_be_written_again(
    new_tier: MakeTier,
    plan: FaultPlan,
    error: type[StorageError],
    code: int,
    counts: FaultCounts,
) -> None:
    tier = new_tier(plan)
    before = store_soundly(tier, 3)
    slots, infos, source = tier.allocate(2), make_infos(2, first_id=3), make_buffers(2, WHOLE_PAGES)
    transfer = tier.write(slots, infos, source)
    with pytest.raises(error) as caught:
        transfer.wait(WAIT_S)
    assert caught.value.errno == code
    assert transfer.num_bytes == 2 * WHOLE_PAGES.slot_bytes
    assert tier.counts == counts
    tier.is_armed = False
    with pytest.raises(CorruptChunk, match="hold no record"):
        load(tier, slots, infos)
    assert same_chunks(load(tier, *before[:2]), before[2], WHOLE_PAGES)
    tier.write(slots, infos, source).wait(WAIT_S)
    assert same_chunks(load(tier, slots, infos), source, WHOLE_PAGES)


@pytest.mark.parametrize("kind", ["flip", "truncate"])
@pytest.mark.parametrize("seed", range(8))
def test_damage_at_rest_is_noticed_by_the_tier_inside_at_every_read(
    new_tier: MakeTier, kind: str, seed: int
) -> None:
    tier = new_tier(FaultPlan.parse(f"{kind}=0.4", seed))
    slots, infos, source = store(tier, 8)
    damaged = tier.damaged
    assert getattr(tier.counts, kind) == tier.counts.total == len(damaged) > 0
    for slot, info, content in zip(slots, infos, source, strict=True):
        for _ in range(2):
            if slot in damaged:
                with pytest.raises(CorruptChunk):
                    load(tier, [slot], [info])
            else:
                assert same_chunks(load(tier, [slot], [info]), [content], WHOLE_PAGES)
    tier.free(slots)
    assert tier.damaged == frozenset()
    assert (tier.num_free, tier.used_bytes) == (8, 0)


def test_damage_waits_until_the_write_has_ended(new_tier: MakeTier) -> None:
    gate = Gate()
    tier = new_tier(FaultPlan(flip=1.0), pwritev=FlakyCall(os.pwritev, gate))
    slots, infos = tier.allocate(2), make_infos(2)
    transfer = tier.write(slots, infos, make_buffers(2, WHOLE_PAGES, seed=1))
    assert gate.reached.wait(WAIT_S)
    with pytest.raises(TransferTimeout, match="disk write of 2 chunks"):
        transfer.wait(0.01)
    assert (tier.damaged, tier.counts) == (frozenset(), FaultCounts())
    gate.open()
    transfer.wait(WAIT_S)
    assert (tier.damaged, tier.counts) == (frozenset(slots), FaultCounts(flip=2))


def test_record_written_again_while_no_fault_strikes_is_whole(new_tier: MakeTier) -> None:
    tier = new_tier(FaultPlan(flip=1.0))
    slots, infos, source = store(tier, 2)
    assert tier.damaged == frozenset(slots)
    tier.is_armed = False
    tier.write(slots[:1], infos[:1], source[:1]).wait(WAIT_S)
    assert tier.damaged == frozenset(slots[1:])
    assert same_chunks(load(tier, slots[:1], infos[:1]), source[:1], WHOLE_PAGES)


def test_slot_freed_before_its_write_was_awaited_is_never_damaged(new_tier: MakeTier) -> None:
    tier = new_tier(FaultPlan(flip=1.0))
    slots = tier.allocate(2)
    transfer = tier.write(slots, make_infos(2), make_buffers(2, WHOLE_PAGES, seed=1))
    transfer._inner.wait(WAIT_S)  # type: ignore[attr-defined]
    tier.free(slots[:1])
    transfer.wait(WAIT_S)
    assert (tier.damaged, tier.counts) == (frozenset(slots[1:]), FaultCounts(flip=1))


def test_plan_that_damages_records_is_refused_for_a_tier_without_records() -> None:
    tier = make_memory_tier()
    with pytest.raises(ConfigError, match=r"flip=0\.01: the cpu tier has no records in files"):
        FaultyTier(tier, FaultPlan(flip=0.01))
    with pytest.raises(ConfigError, match=r"truncate=1"):
        FaultyTier(tier, FaultPlan(truncate=1.0))
    FaultyTier(tier, FaultPlan(fail=1.0)).close()


@pytest.mark.parametrize("direction", ["read", "write"])
@pytest.mark.parametrize("kind", ["delay", "hang"])
def test_late_transfer_is_not_done_before_its_time_and_ends_well_then(
    new_tier: MakeTier, kind: str, direction: str
) -> None:
    tier = new_tier(FaultPlan.parse(f"{kind}=1:0.3"))
    slots, infos, source = store_soundly(tier, 2)
    out = make_buffers(2, WHOLE_PAGES)
    started = time.monotonic()
    transfer = getattr(tier, direction)(slots, infos, out if direction == "read" else source)
    assert not transfer.done()
    transfer.wait(WAIT_S)
    assert time.monotonic() - started >= 0.3
    assert transfer.done()
    tier.is_armed = False
    assert same_chunks(load(tier, slots, infos), source, WHOLE_PAGES)
    assert tier.counts.total == getattr(tier.counts, kind) == 1


@pytest.mark.parametrize("direction", ["read", "write"])
def test_hung_transfer_misses_its_deadline_by_name_and_goes_on(
    new_tier: MakeTier, direction: str
) -> None:
    tier = new_tier(FaultPlan(hang=1.0, hang_s=_LONG_S))
    slots, infos, source = store_soundly(tier, 1)
    out = make_buffers(1, WHOLE_PAGES)
    transfer = getattr(tier, direction)(slots, infos, out if direction == "read" else source)
    for timeout_s in (0.0, 0.01):
        with pytest.raises(TransferTimeout, match=f"disk {direction} of 1 chunks, first of layer"):
            transfer.wait(timeout_s)
    assert not transfer.done()


def test_close_ends_what_hangs_and_the_data_has_moved(new_tier: MakeTier) -> None:
    tier = new_tier(FaultPlan(hang=1.0, hang_s=_LONG_S))
    slots, infos, source = store_soundly(tier, 1)
    out = make_buffers(1, WHOLE_PAGES)
    transfer = tier.read(slots, infos, out)
    is_waiting = threading.Event()

    def wait() -> None:
        is_waiting.set()
        transfer.wait()

    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(wait)
        assert is_waiting.wait(WAIT_S)
        assert not waiting.done()
        tier.close()
        waiting.result(WAIT_S)
    assert transfer.done()
    assert same_chunks(out, source, WHOLE_PAGES)


def test_late_failure_fails_when_its_time_has_come(new_tier: MakeTier) -> None:
    tier = new_tier(FaultPlan(fail=1.0, delay=1.0, delay_s=0.3))
    slots, infos, _ = store_soundly(tier, 1)
    transfer = tier.read(slots, infos, make_buffers(1, WHOLE_PAGES))
    assert not transfer.done()
    with pytest.raises(StorageError, match="injected"):
        transfer.wait(WAIT_S)
    assert transfer.done()
    assert tier.counts == FaultCounts(delay=1, fail=1)


def test_late_transfer_cancelled_before_it_started_is_done_at_once(new_tier: MakeTier) -> None:
    gate = Gate()
    plan = FaultPlan(hang=1.0, hang_s=_LONG_S)
    pwritev = FlakyCall(os.pwritev, gate)
    tier = new_tier(plan, num_threads=1, pwritev=pwritev)
    slots, infos, source = tier.allocate(2), make_infos(2), make_buffers(2, WHOLE_PAGES)
    running = tier.write(slots[:1], infos[:1], source[:1])
    assert gate.reached.wait(WAIT_S)
    queued = tier.write(slots[1:], infos[1:], source[1:])
    assert not running.cancel()
    assert queued.cancel()
    gate.open()
    assert queued.done()
    with pytest.raises(TransferCancelled):
        queued.wait(WAIT_S)
    assert not running.done()


def test_closed_tier_refuses_transfers_whether_or_not_a_fault_would_strike(
    new_tier: MakeTier,
) -> None:
    tier = new_tier(FaultPlan(fail=1.0))
    slots, infos, source = store_soundly(tier, 1)
    tier.close()
    for is_armed in (True, False):
        tier.is_armed = is_armed
        with pytest.raises(ClosedError):
            tier.read(slots, infos, source)
        with pytest.raises(ClosedError):
            tier.write(slots, infos, source)


def outcomes(tier: FaultyTier) -> list[str]:
    """Write and read in a fixed order; name what became of each transfer."""
    found = []
    for step in range(60):
        slots, infos = tier.allocate(2), make_infos(2, first_id=2 * step)
        buffers = make_buffers(2, WHOLE_PAGES, seed=step)
        for move in (tier.write, tier.read):
            try:
                move(slots, infos, buffers).wait(WAIT_S)
                found.append("ok")
            except StorageError as error:
                found.append(str(error))
        found.append(str([slot in tier.damaged for slot in slots]))
        tier.free(slots)
    return found


def test_same_seed_and_order_of_calls_give_the_same_faults(new_tier: MakeTier) -> None:
    plan = FaultPlan.parse("fail=0.1,full=0.1,flip=0.2,truncate=0.2,delay=0.2:0", seed=5)
    first, second = new_tier(plan), new_tier(plan)
    assert outcomes(first) == outcomes(second)
    assert first.counts == second.counts
    assert all(getattr(first.counts, kind) for kind in ("fail", "full", "flip", "truncate"))
