"""The disk tier on a disk that hangs; transfers cancelled, overtaken, and closed upon."""

import os
import threading
from contextlib import closing
from pathlib import Path

import pytest

from offload.errors import TransferCancelled, TransferTimeout
from tests.contracts.tier_contract import WHOLE_PAGES, make_buffers, make_infos, same_chunks
from tests.support.disk import (
    WAIT_S,
    FlakyCall,
    Gate,
    assert_unreadable_and_freeable,
    make_disk_tier,
    read_records,
    write_records,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.mark.parametrize("direction", ["read", "write"])
def test_hung_disk_is_a_timeout_and_the_transfer_ends_when_the_disk_does(
    directory: Path, direction: str
) -> None:
    gate = Gate()
    preadv = FlakyCall(os.preadv, gate, armed=False)
    pwritev = FlakyCall(os.pwritev, gate, armed=False)
    tier = make_disk_tier(directory, 8, WHOLE_PAGES, preadv=preadv, pwritev=pwritev)
    with closing(tier):
        slots, infos, source = write_records(tier, 1)
        out = make_buffers(1, WHOLE_PAGES)
        preadv.armed = pwritev.armed = True
        if direction == "read":
            transfer = tier.read(slots, infos, out)
        else:
            transfer = tier.write(slots, infos, source)
        assert gate.reached.wait(WAIT_S)
        with pytest.raises(TransferTimeout, match=f"disk {direction} of 1 chunks, first of layer"):
            transfer.wait(0.01)
        assert not transfer.done()
        gate.open()
        transfer.wait(WAIT_S)
        assert same_chunks(read_records(tier, slots, infos), source, WHOLE_PAGES)


def test_transfer_cancelled_before_it_started_moves_nothing(directory: Path) -> None:
    gate = Gate()
    pwritev = FlakyCall(os.pwritev, gate)
    with closing(make_disk_tier(directory, 8, WHOLE_PAGES, num_threads=1, pwritev=pwritev)) as tier:
        source, infos = make_buffers(2, WHOLE_PAGES, seed=1), make_infos(2)
        slots = tier.allocate(2)
        running = tier.write(slots[:1], infos[:1], source[:1])
        assert gate.reached.wait(WAIT_S)
        queued = tier.write(slots[1:], infos[1:], source[1:])
        assert not running.cancel()
        assert queued.cancel()
        gate.open()
        running.wait(WAIT_S)
        with pytest.raises(TransferCancelled):
            queued.wait(WAIT_S)
        assert same_chunks(read_records(tier, slots[:1], infos[:1]), source[:1], WHOLE_PAGES)
        assert_unreadable_and_freeable(tier, slots[1:], infos[1:])


def test_reads_overtake_queued_writes(directory: Path) -> None:
    gate, order = Gate(), list[str]()

    def note_write(*_: object) -> None:
        order.append("write")
        gate()

    preadv = FlakyCall(os.preadv, lambda *_: order.append("read"))
    pwritev = FlakyCall(os.pwritev, note_write, armed=False)
    tier = make_disk_tier(directory, 8, WHOLE_PAGES, num_threads=1, preadv=preadv, pwritev=pwritev)
    with closing(tier):
        slots, infos, source = write_records(tier, 1)
        pwritev.armed = True
        more, more_infos = tier.allocate(2), make_infos(2, first_id=1)
        buffers, out = make_buffers(2, WHOLE_PAGES, seed=2), make_buffers(1, WHOLE_PAGES)
        transfers = [tier.write(more[:1], more_infos[:1], buffers[:1])]
        assert gate.reached.wait(WAIT_S)
        transfers.append(tier.write(more[1:], more_infos[1:], buffers[1:]))
        transfers.append(tier.read(slots, infos, out))
        gate.open()
        for transfer in transfers:
            transfer.wait(WAIT_S)
        assert order == ["write", "read", "write"]
        assert same_chunks(out, source, WHOLE_PAGES)


def test_close_during_a_transfer_waits_for_it(directory: Path) -> None:
    gate = Gate()
    pwritev = FlakyCall(os.pwritev, gate)
    tier = make_disk_tier(directory, 8, WHOLE_PAGES, num_threads=1, pwritev=pwritev)
    slots, infos = tier.allocate(2), make_infos(2)
    source = make_buffers(2, WHOLE_PAGES, seed=1)
    transfers = [tier.write(slots[:1], infos[:1], source[:1])]
    assert gate.reached.wait(WAIT_S)
    transfers.append(tier.write(slots[1:], infos[1:], source[1:]))
    closer = threading.Thread(target=tier.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    gate.open()
    closer.join(WAIT_S)
    assert not closer.is_alive()
    assert all(transfer.done() for transfer in transfers)
    for transfer in transfers:
        transfer.wait(0)
    assert list(directory.iterdir()) == []


def test_close_with_a_hung_disk_ends_after_the_deadline_and_says_so(directory: Path) -> None:
    gate = Gate()
    pwritev = FlakyCall(os.pwritev, gate)
    tier = make_disk_tier(
        directory, 8, WHOLE_PAGES, num_threads=1, deadline_s=0.05, pwritev=pwritev
    )
    slots, infos, source = tier.allocate(2), make_infos(2), make_buffers(2, WHOLE_PAGES)
    hung = tier.write(slots[:1], infos[:1], source[:1])
    assert gate.reached.wait(WAIT_S)
    queued = tier.write(slots[1:], infos[1:], source[1:])
    with pytest.raises(TransferTimeout, match="still running"):
        tier.close()
    gate.open()
    hung.wait(WAIT_S)
    with pytest.raises(TransferCancelled):
        queued.wait(WAIT_S)
    tier.check_integrity()
    assert tier.used_bytes == 0
    assert list(directory.iterdir()) == []
