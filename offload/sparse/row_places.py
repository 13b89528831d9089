"""Where in memory the chunks of a row begin, as arrays that follow the chunks when they move."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from offload.sparse.row_keys import Ints, RowKeys, Rows
from offload.store import ChunkStore
from offload.tiers.coded import CodedTier
from offload.tiers.memory import MemoryTier
from offload.tiers.pooled import PooledTier
from offload.types import ChunkId

RowKey = tuple[int, int]
"""A cache or fork, and its row."""

_NOWHERE = 0
"""Number of no chunk, whose address is always 0."""


@dataclass(frozen=True, slots=True)
class RowChunks:
    """The chunks of one row of one layer.

    Attributes
    ----------
    name : Hashable
        Equal for the same chunks.
    ids : ndarray, int64 [num_chunks]
    numbers : ndarray, int64 [num_chunks + 1]
        Of the chunks in ``ChunkPlaces``; the last one is that of no chunk, so that place -1, which
        stands for no token, has address 0.
    """

    name: Hashable
    ids: Ints
    numbers: Ints


class ChunkPlaces:
    """Addresses of the chunks that can be read by address: in a tier's pool or a write buffer.

    Every chunk that was asked about has a number, under which its address is kept until it dies.
    The store names the chunks that move, so a step costs what has moved since the last one.

    Only the thread that holds the engine's lock calls methods.

    Parameters
    ----------
    store : ChunkStore
    device : torch.device
        Who reads: a CPU reads host memory only, a CUDA device its own and page-locked host memory.
    """

    def __init__(self, store: ChunkStore, device: torch.device) -> None:
        self._store = store
        memory = {
            level: tier for level, tier in enumerate(store.tiers) if isinstance(tier, PooledTier)
        }
        readable = ("cpu", device.type)
        self._levels: dict[int, MemoryTier] = {
            level: tier
            for level, tier in memory.items()
            if isinstance(tier, MemoryTier) and tier.pool.slab.device.type in readable
        }
        self._foreign: Mapping[int, PooledTier] = {
            level: tier for level, tier in memory.items() if level not in self._levels
        }
        self._moved: set[ChunkId] = set()
        self._numbers: dict[ChunkId, int] = {}
        self._free: list[int] = []
        self._addresses = np.zeros(1, dtype=np.int64)
        self._rows: dict[tuple[int, RowKey], RowChunks] = {}
        store.watch(self._moved.add)

    def refresh(self) -> list[ChunkId]:
        """Follow the chunks that moved; return those that died since the last time."""
        dead = []
        for chunk in self._moved:
            number = self._numbers.get(chunk)
            if number is None:
                continue
            self._addresses[number] = self._address(chunk)
            if chunk not in self._store.table:
                self._free.append(self._numbers.pop(chunk))
                dead.append(chunk)
        self._moved.clear()
        return dead

    def row(
        self, layer: int, key: RowKey, version: Hashable, chunks: Sequence[ChunkId]
    ) -> RowChunks:
        """Return the chunks of a row, numbered.

        Parameters
        ----------
        layer : int
        key : RowKey
        version : Hashable
            Changes with the row's list of chunks, of which ``chunks`` is a part.
        chunks : sequence of ChunkId
        """
        name = (version, chunks[0] if chunks else None, len(chunks))
        row = self._rows.get((layer, key))
        if row is None or row.name != name:
            ids = np.array(chunks, dtype=np.int64)
            numbers = np.array([*map(self._number, chunks), _NOWHERE], dtype=np.int64)
            row = self._rows[layer, key] = RowChunks(name, ids, numbers)
        return row

    def addresses(self, row: RowChunks) -> Ints:
        """Return where each chunk of a row begins, int64 [num_chunks + 1]; 0 if it must be read."""
        return self._addresses[row.numbers]

    def count_by_tier(self, addresses: Ints) -> dict[str, int]:
        """Return how many of some addresses lie in each tier's pool."""
        counts = {}
        for tier in self._levels.values():
            slab = tier.pool.slab
            inside = (addresses - slab.data_ptr()).view(np.uint64) < np.uint64(slab.nbytes)
            counts[tier.name] = int(np.count_nonzero(inside))
        return counts

    def is_foreign(self, chunk: ChunkId) -> bool:
        """Whether a chunk lies in memory that cannot be read by address: a device's, or codes."""
        return not self._foreign.keys().isdisjoint(self._store.table[chunk].slots)

    def lift(self, keys: Ints, names: RowKeys) -> tuple[NDArray[np.bool_], list[tuple[Ints, Rows]]]:
        """Copy the rows of foreign chunks to the host, or decode them.

        Returns
        -------
        is_lifted : ndarray, bool [len(keys)]
        found : list of (keys, rows)
            Rows are ``uint8 [n, row_bytes]``.
        """
        is_lifted, found = np.zeros(len(keys), dtype=np.bool_), []
        for level, tier in self._foreign.items():
            chunks, which = np.unique(keys // names.per_chunk, return_inverse=True)
            slots = [self._store.table[chunk].slots.get(level, -1) for chunk in chunks.tolist()]
            slot_of = np.array(slots, dtype=np.int64)[which]
            here = (slot_of >= 0) & ~is_lifted
            if here.any():
                rows = tier_rows(tier, names, slot_of[here], keys[here] % names.per_chunk)
                found.append((keys[here], rows))
                is_lifted |= here
        return is_lifted, found

    def forget(self, owner: int) -> None:
        """Drop what is kept for the rows of a cache or fork."""
        self._rows = {place: row for place, row in self._rows.items() if place[1][0] != owner}

    def _number(self, chunk: ChunkId) -> int:
        number = self._numbers.get(chunk)
        if number is None:
            if not self._free:
                known = len(self._addresses)
                self._addresses = np.concatenate([self._addresses, np.zeros(known, np.int64)])
                self._free = list(range(2 * known - 1, known - 1, -1))
            number = self._numbers[chunk] = self._free.pop()
            self._addresses[number] = self._address(chunk)
        return number

    def _address(self, chunk: ChunkId) -> int:
        if chunk not in self._store.table:
            return 0
        entry = self._store.table[chunk]
        for level in sorted(entry.slots):
            if level in self._levels:
                tier = self._levels[level]
                return tier.pool.slab.data_ptr() + entry.slots[level] * tier.slot_bytes
        return 0 if entry.pending is None else entry.pending.data_ptr()


def tier_rows(tier: PooledTier, names: RowKeys, slots: Ints, lines: Ints) -> Rows:
    """Copy rows out of a tier's pool to the host, decoded.

    Parameters
    ----------
    tier : PooledTier
    names : RowKeys
    slots, lines : ndarray, int64 [n]
        Slot, and head * chunk_tokens + token in it.

    Returns
    -------
    ndarray, uint8 [n, row_bytes]
    """
    if isinstance(tier, CodedTier):
        return tier.read_rows(slots, lines)
    slab = tier.pool.slab
    chunks = slab[:, : names.per_chunk * names.row_bytes].unflatten(1, (-1, names.row_bytes))
    at = (torch.from_numpy(slots).to(slab.device), torch.from_numpy(lines).to(slab.device))
    rows: Rows = chunks[at].cpu().numpy()
    return rows
