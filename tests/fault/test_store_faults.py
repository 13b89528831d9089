"""A store whose disk is full, broken, slow, or tampered with: nothing is lost, nothing is wrong."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.errors import CapacityError, CorruptChunk, DiskFull, StorageError, TransferTimeout
from offload.loader import StagingLoader
from offload.prefetch.plan import LoadGroup
from offload.prefetch.stream import ChunkStream
from offload.stats import Counters
from offload.store import ChunkStore
from offload.tiers.eviction import KeepFirst
from offload.tiers.pool import as_chunk, page_aligned
from offload.tiers.syscalls import VectoredCall
from offload.types import ChunkId
from tests.support.disk import WAIT_S, FlakyCall, Gate, fail_with, make_disk_tier
from tests.support.stores import LAYOUT, check, put

CPU = torch.device("cpu")


def make_store(
    directory: Path,
    *,
    num_slots: int = 16,
    num_buffers: int = 4,
    deadline_s: float = WAIT_S,
    preadv: VectoredCall = os.preadv,
    pwritev: VectoredCall = os.pwritev,
) -> ChunkStore:
    """Return a store with a disk tier alone, so that every chunk has to be written."""
    disk = make_disk_tier(directory, num_slots, LAYOUT, preadv=preadv, pwritev=pwritev)
    buffers = page_aligned(num_buffers * LAYOUT.slot_bytes).view(num_buffers, -1)
    return ChunkStore([disk], [KeepFirst()], LAYOUT, list(buffers), Counters(), deadline_s)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., ChunkStore]]:
    """Make stores that are closed, and have removed their files, when the test is over."""
    stores: list[ChunkStore] = []

    def make(**options: object) -> ChunkStore:
        stores.append(make_store(tmp_path / f"disk-{len(stores)}", **options))  # type: ignore[arg-type]
        return stores[-1]

    yield make
    for i, store in enumerate(stores):
        store.close()
        assert list((tmp_path / f"disk-{i}").iterdir()) == []


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


def settle(store: ChunkStore) -> None:
    """Wait for every store in flight, whatever becomes of it."""
    for _ in range(100):
        with contextlib.suppress(StorageError):
            return store.drain()
    raise AssertionError("stores keep failing")


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, StorageError)],
)
def test_chunk_whose_store_failed_stays_readable_and_the_next_ones_are_stored(
    open_store: Callable[..., ChunkStore], code: int, error: type[StorageError]
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(code), armed=False)
    store = open_store(pwritev=pwritev)
    expected = put(store, 2, seed=1)
    store.drain()
    pwritev.armed = True
    refused = put(store, 1, seed=2)
    with pytest.raises(error) as caught:
        store.drain()
    assert caught.value.errno == code
    check(store, expected | refused)
    assert store.tiers[0].num_free == 14
    pwritev.armed = False
    expected |= put(store, 6, seed=3)
    store.drain()
    check(store, expected | refused)


def test_put_that_fails_half_way_keeps_nothing_of_its_chunks(
    open_store: Callable[..., ChunkStore],
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(errno.ENOSPC), armed=False)
    store = open_store(pwritev=pwritev)
    expected = put(store, 3, seed=1)
    store.drain()
    pwritev.armed = True
    with pytest.raises(DiskFull):
        put(store, 9, seed=2)
    settle(store)
    assert set(store.table) == set(expected)
    assert store.tiers[0].num_free == 13
    pwritev.armed = False
    expected |= put(store, 13, seed=3)
    store.drain()
    check(store, expected)


def test_put_beyond_every_capacity_names_the_bytes_and_stores_nothing(
    open_store: Callable[..., ChunkStore],
) -> None:
    store = open_store()
    expected = put(store, 10, seed=1)
    with pytest.raises(CapacityError, match=r"7 more chunks of 4096 bytes.*disk 6 of 16"):
        put(store, 7, seed=2)
    check(store, expected | put(store, 6, seed=3))


def test_buffers_held_by_refused_chunks_are_named_and_come_back_with_their_release(
    open_store: Callable[..., ChunkStore],
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(errno.EIO))
    store = open_store(pwritev=pwritev)
    refused: dict[ChunkId, Tensor] = {}
    for seed in range(4):
        refused |= put(store, 1, seed)
        with pytest.raises(StorageError):
            store.drain()
    with pytest.raises(StorageError, match="4 chunks are held in write buffers because no faster"):
        put(store, 1, seed=9)
    check(store, refused)
    pwritev.armed = False
    store.release(refused)
    expected = put(store, 16, seed=10)
    store.drain()
    check(store, expected)


def test_put_waits_when_the_disk_cannot_keep_up(
    open_store: Callable[..., ChunkStore], gate: Gate
) -> None:
    store = open_store(pwritev=FlakyCall(os.pwritev, gate))
    with ThreadPoolExecutor(1) as executor:
        putting = executor.submit(put, store, 8, 1)
        assert gate.reached.wait(WAIT_S)
        assert not putting.done()
        gate.open()
        expected = putting.result(WAIT_S)
    store.drain()
    check(store, expected)
    assert store.counters.store_wait_s > 0


def test_put_that_misses_its_deadline_keeps_nothing_and_loses_nothing(
    open_store: Callable[..., ChunkStore], gate: Gate
) -> None:
    pwritev = FlakyCall(os.pwritev, gate)
    store = open_store(pwritev=pwritev, deadline_s=0.02)
    expected = put(store, 2, seed=1)
    with pytest.raises(TransferTimeout, match=r"disk write of 2 chunks, first of layer 0 from"):
        put(store, 6, seed=2)
    check(store, expected)
    gate.open()
    store.deadline_s = store._queue._deadline_s = WAIT_S  # type: ignore[union-attr]
    store.drain()
    assert set(store.table) == set(expected)
    expected |= put(store, 14, seed=3)
    store.drain()
    check(store, expected)


def tamper(directory: Path, how: str) -> None:
    """Damage the last payload byte of the only segment, or cut the file."""
    [path] = directory.glob("*.kvseg")
    end = path.stat().st_size - LAYOUT.slot_bytes + LAYOUT.chunk_bytes
    with path.open("r+b") as file:
        if how == "truncated":
            file.truncate(end - 1)
            return
        file.seek(end - 1)
        [byte] = file.read(1)
        file.seek(end - 1)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_damaged_record_raises_and_the_other_chunks_stay_readable(
    open_store: Callable[..., ChunkStore], tmp_path: Path, how: str
) -> None:
    store = open_store()
    expected = put(store, 2, seed=1)
    store.drain()
    tamper(tmp_path / "disk-0", how)
    damaged = list(expected)[-1]
    with pytest.raises(CorruptChunk):
        store.read_chunk(damaged)
    store.release([damaged])
    del expected[damaged]
    check(store, expected | put(store, 3, seed=2))


def group_of(*chunks: ChunkId) -> LoadGroup:
    return LoadGroup(0, len(chunks), chunks)


def test_load_of_a_chunk_whose_store_ends_meanwhile_gets_that_chunk(
    open_store: Callable[..., ChunkStore],
) -> None:
    reads, writes = Gate(), Gate()
    pwritev = FlakyCall(os.pwritev, writes, armed=False)
    store = open_store(preadv=FlakyCall(os.preadv, reads), pwritev=pwritev, num_buffers=2)
    with contextlib.closing(StagingLoader(store, 2, 1, CPU)) as loader:
        [stored] = put(store, 1, seed=1)
        store.drain()
        pwritev.armed = True
        [(pending, content)] = put(store, 1, seed=2).items()
        first = loader.start(group_of(stored), 0)
        second = loader.start(group_of(pending), 1)  # waits behind the first
        writes.open()
        store.drain()
        put(store, 4, seed=3)  # fills the write buffers with something else
        reads.open()
        first.wait(WAIT_S)
        second.wait(WAIT_S)
        assert torch.equal(as_chunk(loader.buffers[1, 0], LAYOUT), content)
        loader.release(group_of(stored), 0, used=True)
        loader.release(group_of(pending), 1, used=True)
    store.check_integrity()


def test_load_that_missed_its_deadline_keeps_buffer_and_chunk_until_the_disk_is_done(
    open_store: Callable[..., ChunkStore], gate: Gate
) -> None:
    store = open_store(preadv=FlakyCall(os.preadv, gate), deadline_s=0.02)
    [(chunk, content)] = put(store, 1, seed=1).items()
    store._queue._deadline_s = WAIT_S  # type: ignore[union-attr]
    store.drain()
    with contextlib.closing(StagingLoader(store, 2, 1, CPU)) as loader:
        impatient = ChunkStream(loader, 2, store.counters, deadline_s=0.2)
        with pytest.raises(TransferTimeout, match="load of 1 chunks of layer 0 from token 0"):
            list(impatient.read([group_of(chunk)], []))
        assert chunk in store.table.protected
        gate.open()
        for _ in range(100):
            with contextlib.suppress(TransferTimeout):
                impatient.drain()
                break
        assert chunk not in store.table.protected
        for _, buffer in impatient.read([group_of(chunk)], []):
            assert torch.equal(as_chunk(loader.buffers[buffer, 0], LAYOUT), content)


def test_load_of_a_repeated_chunk_fills_every_row(open_store: Callable[..., ChunkStore]) -> None:
    store = open_store()
    (first, one), (second, two) = put(store, 2, seed=1).items()
    store.drain()
    with contextlib.closing(StagingLoader(store, 2, 4, CPU)) as loader:
        group = group_of(first, first, second, first)
        loader.start(group, 0).wait(WAIT_S)
        for row, content in enumerate([one, one, two, one]):
            assert torch.equal(as_chunk(loader.buffers[0, row], LAYOUT), content)
        loader.release(group, 0, used=True)


def test_failed_load_leaves_chunks_unprotected_and_in_place(
    open_store: Callable[..., ChunkStore],
) -> None:
    preadv = FlakyCall(os.preadv, fail_with(errno.EIO))
    store = open_store(preadv=preadv)
    expected = put(store, 3, seed=1)
    store.drain()
    with contextlib.closing(StagingLoader(store, 2, 4, CPU)) as loader:
        stream, groups = ChunkStream(loader, 2, store.counters, WAIT_S), [group_of(*expected)]
        with pytest.raises(StorageError, match="read of"):
            list(stream.read(groups, []))
        assert not store.table.protected
        preadv.armed = False
        check(store, expected)
        assert len(list(stream.read(groups, []))) == 1
