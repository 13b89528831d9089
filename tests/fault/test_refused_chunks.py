"""Where chunks go that the disk refused: up where there is room, else held, and never lost."""

import contextlib
import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offload.errors import CapacityError, DiskFull, StorageError
from offload.stats import Counters
from offload.store import ChunkStore
from offload.tiers.eviction import EvictionPolicy, KeepFirst, LeastRecentlyUsed
from offload.tiers.faults import FaultPlan
from offload.tiers.faulty import FaultyTier
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import page_aligned
from offload.tiers.syscalls import VectoredCall
from tests.support.disk import WAIT_S, FlakyCall, fail_with, make_disk_tier
from tests.support.stores import LAYOUT, Contents, check, put

NUM_LAYERS = 2
NUM_BUFFERS = 4
DISK_SLOTS = 16
DISK = 1
"""The level of the disk tier, below one memory tier."""


def make_store(
    directory: Path,
    memory_slots: int,
    *,
    pwritev: VectoredCall = os.pwritev,
    faults: FaultPlan | None = None,
    policy: type[EvictionPolicy] = KeepFirst,
) -> ChunkStore:
    """Return a store on one memory tier, shared by two layers, and a disk tier."""
    memory = MemoryTier(
        "cpu",
        capacity_bytes=memory_slots * LAYOUT.slot_bytes,
        layout=LAYOUT,
        device=torch.device("cpu"),
        num_streams=NUM_LAYERS,
    )
    disk = make_disk_tier(directory, DISK_SLOTS, LAYOUT, pwritev=pwritev)
    tiers = [memory, FaultyTier(disk, FaultPlan() if faults is None else faults)]
    buffers = list(page_aligned(NUM_BUFFERS * LAYOUT.slot_bytes).view(NUM_BUFFERS, -1))
    policies = [policy() for _ in tiers]
    return ChunkStore(tiers, policies, LAYOUT, buffers, Counters(), WAIT_S)


OpenStore = Callable[..., ChunkStore]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[OpenStore]:
    """Make stores that are closed, and have removed their files, when the test is over."""
    stores: list[ChunkStore] = []

    def make(memory_slots: int, **options: object) -> ChunkStore:
        directory = tmp_path / f"disk-{len(stores)}"
        stores.append(make_store(directory, memory_slots, **options))  # type: ignore[arg-type]
        return stores[-1]

    yield make
    for i, store in enumerate(stores):
        store.close()
        assert list((tmp_path / f"disk-{i}").iterdir()) == []


def failures(store: ChunkStore) -> tuple[int, int, int]:
    """Return failed stores, those of dead chunks, and rescued chunks."""
    counters = store.counters
    return counters.failed_stores, counters.unneeded_failures, counters.rescued_chunks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_refused_chunks_move_up_where_there_is_room_and_no_error_is_raised(
    open_store: OpenStore, code: int
) -> None:
    store = open_store(8, pwritev=FlakyCall(os.pwritev, fail_with(code)))
    expected = put(store, 6, seed=1)  # the share of its layer is 4
    store.drain()
    assert {store.level_of(chunk) for chunk in expected} == {0}
    assert failures(store) == (1, 0, 2)
    assert store.tiers[0].num_free == 2
    assert store.tiers[DISK].num_free == DISK_SLOTS
    check(store, expected)


def test_refused_chunks_without_room_are_held_and_the_error_says_how_many_and_why(
    open_store: OpenStore,
) -> None:
    store = open_store(3, pwritev=FlakyCall(os.pwritev, fail_with(errno.ENOSPC)))
    expected = put(store, 4, seed=1)  # one into its share, two and one to the disk
    with pytest.raises(
        DiskFull,
        match="No space left on device; 1 chunks are held in write buffers because no faster tier "
        "has room; free slots: cpu 0 of 3, disk 16 of 16",
    ) as caught:
        store.drain()
    assert caught.value.errno == errno.ENOSPC
    assert failures(store) == (2, 0, 2)
    check(store, expected)


def test_held_chunk_is_stored_by_the_next_drain_once_the_disk_has_recovered(
    open_store: OpenStore,
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(errno.ENOSPC))
    store = open_store(0, pwritev=pwritev)
    expected = put(store, 2, seed=1)
    for _ in range(2):
        with pytest.raises(DiskFull):
            store.drain()
        assert {store.level_of(chunk) for chunk in expected} == {2}
        check(store, expected)
    pwritev.armed = False
    store.drain()
    assert {store.level_of(chunk) for chunk in expected} == {DISK}
    check(store, expected)


def test_held_chunk_moves_up_as_soon_as_there_is_room(open_store: OpenStore) -> None:
    store = open_store(2, pwritev=FlakyCall(os.pwritev, fail_with(errno.EIO)))
    expected = put(store, 1, seed=1, layer=0) | put(store, 1, seed=2, layer=1)  # fills memory
    expected |= (held := put(store, 1, seed=3))
    with pytest.raises(StorageError, match="1 chunks are held"):
        store.drain()
    [first, *_] = expected
    store.release([first])
    del expected[first]
    store.drain()
    assert [store.level_of(chunk) for chunk in held] == [0]
    assert store.counters.rescued_chunks == 1
    check(store, expected)


def test_held_chunks_give_their_buffers_to_the_next_put_once_the_disk_has_recovered(
    open_store: OpenStore,
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(errno.EIO))
    store = open_store(0, pwritev=pwritev)
    expected: Contents = {}
    for seed in range(NUM_BUFFERS):
        expected |= put(store, 1, seed)
        with pytest.raises(StorageError):
            store.drain()
    pwritev.armed = False
    expected |= put(store, 9, seed=9)
    store.drain()
    assert {store.level_of(chunk) for chunk in expected} == {DISK}
    assert store.tiers[DISK].num_free == DISK_SLOTS - len(expected)
    check(store, expected)


def test_held_chunk_for_which_the_disk_has_no_slot_any_more_stays_held(
    open_store: OpenStore,
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(errno.EIO))
    store = open_store(0, pwritev=pwritev)
    expected = put(store, 1, seed=1)
    with pytest.raises(StorageError):
        store.drain()
    pwritev.armed = False
    others = put(store, DISK_SLOTS, seed=2)
    with pytest.raises(CapacityError, match="disk tier full: 1 slots requested, 0 free of 16"):
        store.drain()
    check(store, expected | others)
    store.release([*others][:1])
    store.drain()
    check(store, expected)
    assert {store.level_of(chunk) for chunk in expected} == {DISK}


def test_failed_store_of_chunks_that_died_meanwhile_is_counted_and_raises_nothing(
    open_store: OpenStore,
) -> None:
    store = open_store(0, pwritev=FlakyCall(os.pwritev, fail_with(errno.EIO)))
    store.release(put(store, 2, seed=1))
    store.drain()
    assert failures(store) == (1, 1, 0)
    assert len(store.table) == 0
    store.check_integrity()
    assert store.tiers[DISK].num_free == DISK_SLOTS


def test_put_goes_on_while_the_disk_is_full_until_memory_is_full_too(
    open_store: OpenStore,
) -> None:
    store = open_store(12, pwritev=FlakyCall(os.pwritev, fail_with(errno.ENOSPC)))
    expected: Contents = {}

    def put_without_end() -> None:
        for seed in range(100):
            expected.update(put(store, 1, seed))

    with pytest.raises(DiskFull, match="free slots: cpu 0 of 12"):
        put_without_end()
    assert 12 <= len(expected) <= 12 + NUM_BUFFERS
    check(store, expected)
    store.release(expected)
    store.drain()
    assert len(store.table) == 0
    assert store.tiers[0].num_free == 12


@pytest.mark.parametrize("policy", [KeepFirst, LeastRecentlyUsed])
@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_puts_and_releases_on_a_failing_disk_loses_nothing(
    open_store: OpenStore, seed: int, policy: type[EvictionPolicy]
) -> None:
    choose, faults = random.Random(seed), FaultPlan(seed, fail=0.3, full=0.2)
    store = open_store(5, faults=faults, policy=policy)
    disk = store.tiers[DISK]
    assert isinstance(disk, FaultyTier)
    expected: Contents = {}
    for step in range(120):
        with contextlib.suppress(StorageError, CapacityError):
            if choose.random() < 0.6:
                expected |= put(store, choose.randint(1, 4), step, layer=step % NUM_LAYERS)
            else:
                store.drain()
        for chunk in choose.sample(sorted(expected), len(expected) // 8):
            store.release([chunk])
            del expected[chunk]
        disk.is_armed = False  # reads fail too, and that is not what this is about
        check(store, expected)
        disk.is_armed = True
    disk.is_armed = False
    with contextlib.suppress(StorageError, CapacityError):
        store.drain()
    check(store, expected)
    assert store.counters.failed_stores
    assert store.counters.rescued_chunks
    store.release(expected)
    store.drain()
    assert len(store.table) == 0
    assert [tier.used_bytes for tier in store.tiers] == [0, 0]
