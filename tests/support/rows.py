"""Stores whose single rows are read, and what these rows must be."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from offload.sparse.row_plan import RowMemory
from offload.sparse.row_reader import RowReader
from offload.stats import Counters
from offload.store import ChunkStore
from offload.tiers.base import Tier
from offload.tiers.disk import DiskTier
from offload.tiers.eviction import KeepFirst
from offload.tiers.faults import FaultPlan
from offload.tiers.faulty import FaultyTier
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import page_aligned
from offload.tiers.syscalls import VectoredCall
from offload.types import PAGE_BYTES, ChunkId
from tests.support.disk import WAIT_S
from tests.support.stores import LAYOUT, Contents, put

HEADS = range(LAYOUT.num_kv_heads)
ROW_BYTES = LAYOUT.row_dim * LAYOUT.dtype.itemsize
MANY_LINES = 1 << 16
"""Bytes for more lines than a test uses."""
OWNER = 1

Ints = NDArray[np.int64]


@dataclass
class Shelf:
    """A store, its reader, and the chunks of one row.

    Attributes
    ----------
    disk : Tier
        The last tier.
    contents : dict
        What each chunk holds.
    """

    store: ChunkStore
    reader: RowReader
    disk: Tier
    contents: Contents = field(default_factory=dict)

    @property
    def counters(self) -> Counters:
        return self.store.counters

    @property
    def chunks(self) -> list[ChunkId]:
        return list(self.contents)

    def locate(
        self, ids: Ints, deadline_s: float | None = None, *, row: int = 0, layer: int = 0
    ) -> Ints:
        """Ask for rows of all heads; check those that there are."""
        chunks = self.chunks
        found = self.reader.locate(
            layer, (OWNER, row), tuple(chunks), chunks, HEADS, ids, deadline_s=deadline_s
        )
        self.check(ids, found)
        return found

    def prefetch(self, ids: Ints) -> int:
        chunks = self.chunks
        return self.reader.prefetch(0, (OWNER, 0), tuple(chunks), chunks, HEADS, ids)

    def check(self, ids: Ints, found: Ints) -> None:
        """Every row that was found is the one that was asked for."""
        for head, token in np.ndindex(ids.shape):
            if found[head, token]:
                chunk, offset = divmod(int(ids[head, token]), LAYOUT.chunk_tokens)
                expected = self.contents[self.chunks[chunk]][head, offset]
                assert row_at(int(found[head, token])) == expected.numpy().tobytes()
            assert ids[head, token] >= 0 or not found[head, token]

    def land(self) -> None:
        """Wait until the reads under way have ended; nothing is taken."""
        self.reader._reads.settle(WAIT_S)

    def check_nothing_left(self) -> None:
        """No read is under way, no chunk protected, no buffer lost."""
        reads = self.reader._reads
        self.store.drain()  # what is being written is protected, too
        assert self.reader.num_flying == 0
        assert not self.store.table.protected
        assert sorted(reads._free) == list(range(reads.num_buffers))
        self.store.check_integrity()


@contextmanager
def open_shelf(
    directory: Path,
    num_chunks: int,
    *,
    memory_chunks: int = 0,
    num_buffers: int = 8,
    line_bytes: int = MANY_LINES,
    num_threads: int = 2,
    faults: FaultPlan | None = None,
    preadv: VectoredCall = os.preadv,
) -> Iterator[Shelf]:
    """Fill a store; the chunks that do not fit into memory lie on the disk when it is yielded."""
    memory = MemoryTier(
        "cpu",
        capacity_bytes=memory_chunks * LAYOUT.slot_bytes,
        layout=LAYOUT,
        device=torch.device("cpu"),
    )
    own = DiskTier(
        directory,
        capacity_bytes=64 * (PAGE_BYTES + LAYOUT.slot_bytes),
        layout=LAYOUT,
        num_threads=num_threads,
        deadline_s=WAIT_S,
        preadv=preadv,
    )
    disk = own if faults is None else FaultyTier(own, faults)
    if isinstance(disk, FaultyTier):
        disk.is_armed = False
    buffers = list(page_aligned(4 * LAYOUT.slot_bytes).view(4, -1))
    tiers: list[Tier] = [memory, disk]
    store = ChunkStore(tiers, [KeepFirst(), KeepFirst()], LAYOUT, buffers, Counters(), WAIT_S)
    sizes = RowMemory(num_buffers * PAGE_BYTES, line_bytes)
    shelf = Shelf(store, RowReader(store, torch.device("cpu"), sizes), disk)
    try:
        shelf.contents = put(store, num_chunks, seed=1)
        store.drain()
        yield shelf
        shelf.reader.close()
        shelf.check_nothing_left()
    finally:
        store.close()


def row_at(address: int) -> bytes:
    """Return the bytes of a row."""
    return ctypes.string_at(address, ROW_BYTES)


def tokens(*ids: int) -> Ints:
    """Return the same tokens for every head, the best first."""
    return np.array([ids] * len(HEADS), dtype=np.int64)
