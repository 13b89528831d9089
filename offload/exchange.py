"""Chunks change places between memory and disk: what matters more comes up, what less goes down."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from offload.errors import OffloadError, TransferTimeout
from offload.exchange_choice import ExchangeChoice, Match
from offload.memory_moves import copy_down
from offload.placement import FIRST, make_ranking
from offload.store import ChunkStore
from offload.tiers.base import ReadsParts
from offload.tiers.eviction import Ranking
from offload.tiers.pool import page_aligned
from offload.tiers.pooled import PooledTier
from offload.tiers.transfer import Transfer
from offload.types import ChunkId, SlotId
from offload.write_queue import settle

BUFFERS_EACH: Final = 2
"""Of one exchange: for what comes up, and for what goes down."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy of a chunk in memory, on its way to the disk."""

    slot: SlotId
    transfer: Transfer


@dataclass(frozen=True, slots=True, eq=False)
class _Exchange:
    """A match whose transfers have begun."""

    match: Match
    buffers: Tensor
    read: Transfer
    copy: _Copy | None

    @property
    def transfers(self) -> list[Transfer]:
        return [self.read] if self.copy is None else [self.read, self.copy.transfer]


class ChunkExchange:
    """Exchanges chunks that lie on the disk only for chunks in memory, a few at a time.

    Nothing is waited for: an exchange begins in one round and takes place in a later one, when the
    newcomer has been read and the leaver, if it had no other copy, is on the disk as well. Until
    then both are where they were, readable; if a transfer fails they stay there, which is counted.
    What came up keeps its copy on the disk, so that it can leave without being written again.

    Only the thread that holds the engine's lock calls methods, and never between the moment when
    addresses of chunks were handed out and that when they were used.

    Parameters
    ----------
    store : ChunkStore
        Its last tier reads parts.
    rankings : mapping of int to Ranking
        See ``ExchangeChoice``.
    buffers : Tensor, uint8 [num_exchanges, 2, slot_bytes]
        Page-aligned host memory. As many exchanges are under way at a time, at most.
    """

    def __init__(self, store: ChunkStore, rankings: Mapping[int, Ranking], buffers: Tensor) -> None:
        disk = store.tiers[-1]
        assert isinstance(disk, ReadsParts)
        self._store = store
        self._parts = disk
        self._disk, self._bottom = store.tiers[-1], len(store.tiers) - 1
        self._choice = ExchangeChoice(store, rankings)
        self._free = list(buffers)
        self._under_way: list[_Exchange] = []

    def observe(self, masses: Mapping[ChunkId, float]) -> None:
        """Make one round: take note of attention, end what is ready, and begin more.

        Parameters
        ----------
        masses : mapping of ChunkId to float
            As for ``EvictionPolicy.observe``; chunks that have died are left out.
        """
        for exchange in list(self._under_way):
            if all(transfer.done() for transfer in exchange.transfers):
                self._end(exchange)
        masses = {chunk: mass for chunk, mass in masses.items() if chunk in self._store.table}
        self._choice.observe(masses)
        busy = [exchange.match for exchange in self._under_way]
        for match in self._choice.choose(masses, len(self._free), busy):
            self._begin(match)

    def settle(self) -> None:
        """Wait for the exchanges under way, and let them take place.

        Raises
        ------
        TransferTimeout
            A transfer has missed the store's deadline; its exchange is still under way.
        """
        for exchange in list(self._under_way):
            for transfer in exchange.transfers:
                _ended_well(transfer, self._store.deadline_s)
            self._end(exchange)

    def _begin(self, match: Match) -> None:
        """Begin an exchange, or count that it could not."""
        level, newcomer, leaver = match
        table, buffers = self._store.table, self._free.pop()
        is_single = leaver is not None and len(table[leaver].slots) == 1
        has_room = not is_single or self._store.positions_with_room(self._bottom, 1, 1)
        read = self._read(newcomer, buffers[0]) if has_room else None
        if read is None:
            self._free.append(buffers)
            self._choice.rest([newcomer])
            self._store.counters.failed_exchanges += 1
            return
        copy = self._write(leaver, level, buffers[1]) if leaver is not None and is_single else None
        table.protect(match.chunks)
        self._under_way.append(_Exchange(match, buffers, read, copy))

    def _read(self, chunk: ChunkId, buffer: Tensor) -> Transfer | None:
        """Begin to read a chunk from the disk, after all that steps wait for; None: it cannot."""
        layout, entry = self._store.layout, self._store.table[chunk]
        parts = slice(0, layout.num_kv_heads * self._parts.parts_per_head)
        out = buffer[: layout.chunk_bytes]
        try:
            return self._parts.read_parts(
                [entry.slots[self._bottom]], [entry.info], parts, [out], urgent=False
            )
        except OffloadError:
            return None

    def _write(self, chunk: ChunkId, level: int, buffer: Tensor) -> _Copy | None:
        """Begin to write a copy of a chunk in memory to the disk; None: it cannot."""
        entry = self._store.table[chunk]
        source = self._store.tiers[level]
        copy_down(source, entry.slots[level], entry.info, buffer)
        settle()
        slots: list[SlotId] = []
        try:
            slots = self._disk.allocate(1, stream=entry.info.layer)
            return _Copy(slots[0], self._disk.write(slots, [entry.info], [buffer]))
        except OffloadError:
            self._disk.free(slots)
            return None

    def _end(self, exchange: _Exchange) -> None:
        """Let an exchange whose transfers are over take place, if both chunks can still move."""
        store, (level, newcomer, leaver) = self._store, exchange.match
        self._under_way.remove(exchange)
        is_read = _ended_well(exchange.read)
        if is_read:
            store.counters.add_loaded(self._disk.name, self._disk.slot_bytes)
        if leaver is not None and exchange.copy is not None:
            self._book(leaver, exchange.copy)
        store.unprotect(exchange.match.chunks)
        settle()  # whoever has an address of the leaver has read it by now
        has_moved = (
            is_read
            and newcomer in store.table
            and (leaver is None or self._send_down(leaver, level))
            and store.promote(newcomer, level, exchange.buffers[0])
        )
        self._free.append(exchange.buffers)
        self._choice.rest(exchange.match.chunks)
        store.counters.failed_exchanges += not has_moved

    def _book(self, chunk: ChunkId, copy: _Copy) -> None:
        """Keep a copy on the disk, unless it failed, or the chunk has got there another way."""
        entry = self._store.table[chunk]
        is_there = self._bottom in entry.slots or entry.pending is not None
        if not _ended_well(copy.transfer) or is_there:
            self._disk.free([copy.slot])
            return
        self._store.counters.add_stored(self._disk.name, self._disk.slot_bytes)
        self._store.arrive(chunk, self._bottom, copy.slot)

    def _send_down(self, chunk: ChunkId, level: int) -> bool:
        """Give up the copy in memory of a chunk that has another; whether it has left now."""
        table = self._store.table
        if chunk not in table or level not in table[chunk].slots:
            return True
        if len(table[chunk].slots) == 1 or chunk in table.protected:
            return False
        self._store.drop_copy(chunk, level)
        self._store.counters.demoted_chunks += 1
        return True


def open_exchange(placement: str, store: ChunkStore, num_exchanges: int) -> ChunkExchange | None:
    """Return what moves the chunks of a store, unless they stay where they were put.

    Parameters
    ----------
    placement : str
        A name of ``PLACEMENTS``.
    store : ChunkStore
    num_exchanges : int
        Under way at a time; each takes two buffers of host memory, which the caller counts.
    """
    if placement == FIRST:
        return None
    rankings = {
        level: make_ranking(placement, lambda chunk: store.table[chunk].info.layer)
        for level, tier in enumerate(store.tiers)
        if isinstance(tier, PooledTier)
    }
    memory = page_aligned(num_exchanges * BUFFERS_EACH * store.layout.slot_bytes)
    return ChunkExchange(store, rankings, memory.view(num_exchanges, BUFFERS_EACH, -1))


def _ended_well(transfer: Transfer, timeout_s: float = 0.0) -> bool:
    """Wait for a transfer, and return whether it moved what it was to move."""
    try:
        transfer.wait(timeout_s)
    except TransferTimeout:
        raise
    except OffloadError:
        return False
    return True
