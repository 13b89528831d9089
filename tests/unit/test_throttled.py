"""Links, and tiers behind them: when transfers end, by a clock that only moves when waited for."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from offload.errors import ConfigError, TransferCancelled, TransferTimeout
from offload.tiers.base import ReadsParts
from offload.tiers.memory import MemoryTier
from offload.tiers.throttled import SerialLink, ThrottledTier, ThrottledTransfer
from offload.tiers.transfer import Transfer
from offload.tiers.virtual_clock import RealClock, VirtualClock
from offload.types import ChunkInfo, SlotId
from tests.contracts.tier_contract import WHOLE_PAGES, make_buffers, make_infos, same_chunks
from tests.support.disk import make_disk_tier, write_records

SLOT_S = float(WHOLE_PAGES.slot_bytes)
"""What a slot takes at one byte a second."""


def make_tier(clock: VirtualClock, request_s: float = 0.0, num_slots: int = 8) -> ThrottledTier:
    return ThrottledTier(make_memory(num_slots), SerialLink(1.0, request_s, clock))


def make_memory(num_slots: int = 8) -> MemoryTier:
    size, device = num_slots * WHOLE_PAGES.slot_bytes, torch.device("cpu")
    return MemoryTier("cpu", capacity_bytes=size, layout=WHOLE_PAGES, device=device)


def read(tier: ThrottledTier, slots: Sequence[SlotId]) -> Transfer:
    return tier.read(slots, make_infos(len(slots)), make_buffers(len(slots), WHOLE_PAGES))


@pytest.mark.parametrize("request_s", [0.0, 5.0])
def test_transfer_ends_when_the_clock_has_reached_its_bytes_and_requests(request_s: float) -> None:
    clock = VirtualClock()
    tier = make_tier(clock, request_s)
    transfer = read(tier, tier.allocate(3))
    due_s, before = 3 * (SLOT_S + request_s), threading.Event()
    clock.wait_until(due_s - 0.5, before)
    assert not transfer.done()
    clock.wait_until(due_s, before)
    assert transfer.done()


def test_waiting_for_a_transfer_moves_the_clock_to_its_end_and_no_further() -> None:
    clock = VirtualClock()
    tier = make_tier(clock)
    first, second = (read(tier, tier.allocate(n)) for n in (2, 3))
    first.wait()
    assert (clock.now_s(), first.done(), second.done()) == (2 * SLOT_S, True, False)
    second.wait()
    first.wait()
    assert clock.now_s() == 5 * SLOT_S


def test_link_that_was_idle_begins_when_it_is_asked() -> None:
    clock = VirtualClock()
    tier = make_tier(clock)
    slots = tier.allocate(1)
    clock.wait_until(1000.0, threading.Event())
    read(tier, slots).wait()
    assert clock.now_s() == 1000.0 + SLOT_S


def test_tiers_that_share_a_link_take_turns() -> None:
    clock = VirtualClock()
    link = SerialLink(1.0, 0.0, clock)
    one, other = ThrottledTier(make_memory(), link), ThrottledTier(make_memory(), link)
    slots = one.allocate(2)
    one.write(slots, make_infos(2), make_buffers(2, WHOLE_PAGES))
    read(other, other.allocate(1)).wait()
    assert clock.now_s() == 3 * SLOT_S


def test_encoded_slots_take_their_stored_bytes() -> None:
    clock = VirtualClock()
    link = SerialLink(1.0, 0.0, clock)
    tier = ThrottledTier(make_memory(), link, lambda slots: 100 * len(slots))
    transfer = read(tier, tier.allocate(3))
    transfer.wait()
    assert clock.now_s() == 300
    assert transfer.num_bytes == 3 * WHOLE_PAGES.slot_bytes


def test_missed_deadline_names_the_transfer_which_goes_on() -> None:
    clock = VirtualClock()
    tier = make_tier(clock)
    transfer = read(tier, tier.allocate(2))
    with pytest.raises(TransferTimeout, match="cpu read of 2 chunks"):
        transfer.wait(timeout_s=SLOT_S)
    assert clock.now_s() == SLOT_S
    transfer.wait(timeout_s=SLOT_S)
    assert transfer.done()


def test_close_ends_what_the_link_holds_back() -> None:
    clock = VirtualClock()
    tier = make_tier(clock)
    transfer = read(tier, tier.allocate(2))
    tier.close()
    assert transfer.done()
    transfer.wait(timeout_s=0)
    assert clock.now_s() == 0.0


class _Cancellable:
    """A transfer that has not started."""

    num_bytes = 10

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        raise TransferCancelled("cancelled")

    def cancel(self) -> bool:
        return True


def test_cancelled_transfer_is_not_waited_for() -> None:
    clock = VirtualClock()
    transfer = ThrottledTransfer("read", _Cancellable(), 100.0, clock, threading.Event())
    assert transfer.cancel()
    assert transfer.done()
    with pytest.raises(TransferCancelled):
        transfer.wait()
    assert clock.now_s() == 0.0


def test_transfer_that_is_under_way_cannot_be_cancelled() -> None:
    clock = VirtualClock()
    tier = make_tier(clock)
    transfer = read(tier, tier.allocate(1))
    assert not transfer.cancel()
    assert not transfer.done()


def test_parts_of_a_disk_tiers_slots_take_their_own_bytes_only(tmp_path: Path) -> None:
    clock = VirtualClock()
    disk = make_disk_tier(tmp_path, 4, WHOLE_PAGES)
    slots, infos, _ = write_records(disk, 2)
    tier = ThrottledTier(disk, SerialLink(1.0, 1.0, clock))
    out = list(torch.empty(2, tier.part_bytes, dtype=torch.uint8))
    tier.read_parts(slots, infos, slice(0, 1), out).wait()
    assert clock.now_s() == 2 * (tier.part_bytes + 1.0)
    tier.close()


def test_only_a_tier_that_reads_parts_is_one_behind_a_link(tmp_path: Path) -> None:
    disk, link = make_disk_tier(tmp_path, 4, WHOLE_PAGES), SerialLink(1.0)
    with pytest.raises(ConfigError, match="cpu tier reads whole chunks only"):
        ThrottledTier(make_memory(), link).read_parts([], [], [], [])
    assert isinstance(ThrottledTier(disk, link), ReadsParts)
    assert not isinstance(ThrottledTier(make_memory(), link), ReadsParts)
    disk.close()


def test_bytes_behind_a_link_are_those_of_the_tier_inside() -> None:
    tier = make_tier(VirtualClock())
    source, out = make_buffers(3, WHOLE_PAGES, seed=1), make_buffers(3, WHOLE_PAGES)
    slots, infos = tier.allocate(3), [ChunkInfo(i, 0, 0) for i in range(3)]
    tier.write(slots, infos, source).wait()
    tier.read(slots, infos, out).wait()
    assert same_chunks(out, source, WHOLE_PAGES)


@pytest.mark.parametrize(("bytes_per_s", "request_s"), [(0.0, 0.0), (-1.0, 0.0), (1.0, -1.0)])
def test_link_of_impossible_speed_is_refused(bytes_per_s: float, request_s: float) -> None:
    with pytest.raises(ConfigError, match="no link"):
        SerialLink(bytes_per_s, request_s)


def test_real_clock_waits_until_a_moment_or_until_it_is_interrupted() -> None:
    clock, interrupted = RealClock(), threading.Event()
    due_s = clock.now_s() + 0.002
    clock.wait_until(due_s, interrupted)
    assert clock.now_s() >= due_s
    waiter = threading.Thread(target=clock.wait_until, args=(clock.now_s() + 1e6, interrupted))
    waiter.start()
    interrupted.set()
    waiter.join(30)
    assert not waiter.is_alive()


def test_link_without_a_clock_runs_on_the_machines() -> None:
    tier = ThrottledTier(make_memory(), SerialLink(WHOLE_PAGES.slot_bytes / 0.002))
    started_s = time.monotonic()
    read(tier, tier.allocate(1)).wait(30)
    assert time.monotonic() - started_s >= 0.002


def test_virtual_clock_never_goes_back_and_stands_still_when_interrupted() -> None:
    clock, interrupted = VirtualClock(), threading.Event()
    clock.wait_until(5.0, interrupted)
    clock.wait_until(3.0, interrupted)
    assert clock.now_s() == 5.0
    interrupted.set()
    clock.wait_until(9.0, interrupted)
    assert clock.now_s() == 5.0
