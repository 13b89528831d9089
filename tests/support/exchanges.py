"""Stores whose chunks change places by the attention that they get."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from offload.exchange import ChunkExchange, open_exchange
from offload.stats import Counters
from offload.store import ChunkStore
from offload.tiers.eviction import KeepFirst
from offload.tiers.faults import FaultPlan
from offload.tiers.faulty import FaultyTier
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import page_aligned
from offload.tiers.syscalls import VectoredCall
from offload.types import ChunkId
from tests.support.disk import WAIT_S, make_disk_tier
from tests.support.stores import LAYOUT, Contents, check, put


@dataclass
class Exchanges:
    """A store, what moves its chunks, and what they hold."""

    store: ChunkStore
    exchange: ChunkExchange
    contents: Contents = field(default_factory=dict)

    @property
    def counters(self) -> Counters:
        return self.store.counters

    @property
    def chunks(self) -> list[ChunkId]:
        return list(self.contents)

    @property
    def in_memory(self) -> set[int]:
        """Positions of the chunks in memory."""
        bottom = len(self.store.tiers) - 1
        levels = map(self.store.level_of, self.chunks)
        return {position for position, level in enumerate(levels) if level < bottom}

    def observe(self, masses: Mapping[int, float]) -> None:
        """Make one round; chunks are named by their positions."""
        chunks = self.chunks
        self.exchange.observe({chunks[position]: mass for position, mass in masses.items()})

    def run(self, masses: Mapping[int, float], rounds: int = 1) -> None:
        """Make rounds, each of which lets the exchanges of the last one take place."""
        for _ in range(rounds):
            self.observe(masses)
            self.exchange.settle()
            check(self.store, self.contents)

    def arm(self, *, is_armed: bool = True) -> None:
        disk = self.store.tiers[-1]
        assert isinstance(disk, FaultyTier)
        disk.is_armed = is_armed

    def check_nothing_left(self) -> None:
        """Nothing is under way, and no chunk is protected."""
        self.exchange.settle()
        self.store.drain()
        assert not self.store.table.protected
        check(self.store, self.contents)


@contextmanager
def open_exchanges(
    directory: Path,
    num_chunks: int,
    *,
    memory: tuple[int, ...] = (4,),
    disk_slots: int = 64,
    placement: str = "mass",
    most: int = 4,
    faults: FaultPlan | None = None,
    preadv: VectoredCall = os.preadv,
    pwritev: VectoredCall = os.pwritev,
) -> Iterator[Exchanges]:
    """Fill a store: the first chunks are in memory, the others on the disk."""
    own = make_disk_tier(directory, disk_slots, LAYOUT, preadv=preadv, pwritev=pwritev)
    disk = own if faults is None else FaultyTier(own, faults)
    names = ("gpu", "cpu")[-len(memory) :]
    levels = [
        MemoryTier(
            name,
            capacity_bytes=slots * LAYOUT.slot_bytes,
            layout=LAYOUT,
            device=torch.device("cpu"),
        )
        for name, slots in zip(names, memory, strict=True)
    ]
    tiers = [*levels, disk]
    buffers = list(page_aligned(4 * LAYOUT.slot_bytes).view(4, -1))
    policies = [KeepFirst() for _ in tiers]
    store = ChunkStore(tiers, policies, LAYOUT, buffers, Counters(), WAIT_S)
    exchange = open_exchange(placement, store, most)
    assert exchange is not None
    found = Exchanges(store, exchange)
    try:
        if faults is not None:
            found.arm(is_armed=False)
        found.contents = put(store, num_chunks, seed=1)
        store.drain()
        yield found
        found.check_nothing_left()
    finally:
        store.close()
