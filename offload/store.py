"""The tiered store: puts chunks where there is room, moves them down and up, never loses one."""

from collections.abc import Callable, Iterable, Sequence
from itertools import product

from torch import Tensor

from offload.chunk_reader import start_read
from offload.errors import OffloadError
from offload.memory_moves import copy_down, copy_slot, fill_slots
from offload.room import describe_room, no_room, second_copies
from offload.source import ChunkSource, split
from offload.stats import Counters
from offload.table import ChunkTable
from offload.tiers.base import Tier
from offload.tiers.eviction import EvictionPolicy
from offload.tiers.pool import as_chunk, page_aligned
from offload.tiers.pooled import PooledTier
from offload.types import ChunkId, ChunkInfo, ChunkLayout, SlotId
from offload.write_queue import WriteQueue, settle


class ChunkStore:
    """Chunks on an ordered list of tiers, fastest first.

    A chunk is in at least one tier, or in a write buffer on its way to the disk, from the moment
    ``put`` returns until its last reference is released ("never in neither"). After a failed store
    it is in the buffer or an upper tier; a failed load leaves it in the lower one.

    Only the thread that runs the model calls methods; see ``WriteQueue`` for what happens behind.

    Parameters
    ----------
    tiers : sequence of Tier
        Memory tiers first; at most one disk tier, last.
    policies : sequence of EvictionPolicy
        One per tier.
    layout : ChunkLayout
    write_buffers : sequence of Tensor, uint8 [slot_bytes]
        Page-aligned host memory; needed with a disk tier only.
    counters : Counters
    deadline_s : float
        Longest wait for one transfer.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        policies: Sequence[EvictionPolicy],
        layout: ChunkLayout,
        write_buffers: Sequence[Tensor],
        counters: Counters,
        deadline_s: float,
    ) -> None:
        self.tiers = list(tiers)
        self.layout = layout
        self.table = ChunkTable()
        self.counters = counters
        self.deadline_s = deadline_s
        self.version = 0
        """Grows whenever a chunk changes place; plans made for an older version are stale."""
        self._watchers: list[Callable[[ChunkId], object]] = []
        self._policies = list(policies)
        self._peaks = [0] * len(self.tiers)
        self._queue: WriteQueue | None = None
        if not isinstance(self.tiers[-1], PooledTier):
            disk = len(self.tiers) - 1
            self._queue = WriteQueue(
                self.tiers[disk],
                self.table,
                write_buffers,
                counters,
                deadline_s,
                lambda chunk, slot: self.arrive(chunk, disk, slot),
                self.unprotect,
                self._rescue,
                lambda: describe_room(self.tiers),
            )

    def watch(self, moved: Callable[[ChunkId], object]) -> None:
        """Call ``moved`` with every chunk that changes place or dies, when it just did."""
        self._watchers.append(moved)

    def put(
        self, layer: int, first_token: int, keys: Tensor, values: Tensor
    ) -> list[list[ChunkId]]:
        """Store whole chunks of one layer, for all rows of a batch.

        Parameters
        ----------
        layer : int
        first_token : int
            Position of the first token.
        keys, values : Tensor, shape (batch, num_kv_heads, num_chunks * chunk_tokens, dim)

        Returns
        -------
        list of list of ChunkId
            By position, then by row; one reference each.

        Raises
        ------
        CapacityError
            No tier has room. Nothing was stored.
        DiskFull, StorageError, TransferTimeout
            The disk failed, and the tiers above have no room. Nothing of this call is kept; chunks
            of earlier calls are where they were, or readable from their write buffers.
        """
        source = split(keys, values, self.layout.chunk_tokens)
        batch, num_chunks = source.keys.shape[:2]
        self.reap()
        missing = batch * num_chunks - sum(tier.num_free for tier in self.tiers)
        if missing > 0 and missing > len(second_copies(self.tiers, self.table)):
            raise no_room(self.tiers, batch * num_chunks)
        placed: list[list[ChunkId]] = []
        try:
            # First within the layer's share of every tier, so that all layers are spread alike and
            # their reads overlap evenly; then wherever there is room.
            for stream, level in product((layer, None), range(len(self.tiers))):
                start = len(placed)
                count = self.positions_with_room(level, num_chunks - start, batch, stream)
                if count:
                    token = first_token + start * self.layout.chunk_tokens
                    part = source.positions(start, start + count)
                    placed += self._place(level, layer, token, part)
            if len(placed) < num_chunks:
                raise no_room(self.tiers, batch * (num_chunks - len(placed)))
        except OffloadError:
            self.release(chunk for row in placed for chunk in row)
            raise
        return placed

    def adopt(self, info: ChunkInfo, slot: SlotId) -> ChunkId:
        """Return a new chunk, with one reference, whose record the disk tier has adopted.

        Parameters
        ----------
        info : ChunkInfo
            What the record says.
        slot : SlotId
        """
        chunk = self.table.create(info.layer, info.first_token, info.chunk_id)
        self.arrive(chunk, len(self.tiers) - 1, slot)
        return chunk

    def adopt_copies(self, copies: Iterable[tuple[ChunkId, ChunkInfo, SlotId]]) -> None:
        """Exchange the disk copies of chunks for records that the disk tier has adopted.

        Nothing happens to a chunk that has no copy there, or that a transfer uses now.
        """
        disk, freed = len(self.tiers) - 1, []
        for chunk, info, slot in copies:
            entry = self.table[chunk]
            if disk in entry.slots and not entry.protect_count:
                freed.append(entry.slots[disk])
                entry.slots[disk], entry.info = slot, info
        self.tiers[disk].free(freed)  # at once: neighbours become one hole
        self.version += 1

    def release(self, chunks: Iterable[ChunkId]) -> None:
        """Drop one reference from each chunk; free those that nobody needs."""
        self._bury(self.table.release(chunks))

    def unprotect(self, chunks: Iterable[ChunkId]) -> None:
        """Undo ``table.protect``; a chunk released meanwhile is freed now."""
        self._bury(self.table.unprotect(chunks))

    def touch(self, chunks: Iterable[ChunkId]) -> None:
        """Tell the eviction policies that chunks were read."""
        chunks = list(chunks)
        for policy in self._policies:
            policy.touch(chunks)

    def read_chunk(self, chunk: ChunkId) -> Tensor:
        """Return a copy of one chunk, ``[num_kv_heads, chunk_tokens, row_dim]``, on the host."""
        out = page_aligned(self.layout.slot_bytes)
        start_read(self.tiers, self.table, [chunk], [out]).wait(self.deadline_s)
        return as_chunk(out, self.layout)

    def level_of(self, chunk: ChunkId) -> int:
        """Return the fastest level that holds a chunk; ``len(tiers)`` if only a buffer does."""
        return min(self.table[chunk].slots, default=len(self.tiers))

    def promote(self, chunk: ChunkId, level: int, content: Tensor) -> bool:
        """Copy a chunk that was just loaded into a free slot of a faster memory tier.

        A copy on the disk stays, so that leaving the faster tier again costs nothing; one in memory
        is dropped, because memory is what is scarce.

        Parameters
        ----------
        chunk : ChunkId
        level : int
        content : Tensor, uint8 [slot_bytes]
            The chunk's bytes, on a device that the tier can copy from.

        Returns
        -------
        bool
            Whether there was a free slot, and the chunk was not there already.
        """
        tier, entry = self.tiers[level], self.table[chunk]
        if level >= self.level_of(chunk) or not entry.slots or not tier.num_free:
            return False
        slots = tier.allocate(1, stream=entry.info.layer)
        tier.write(slots, [entry.info], [content]).wait(self.deadline_s)
        for lower in list(entry.slots):
            if isinstance(self.tiers[lower], PooledTier) and chunk not in self.table.protected:
                self.drop_copy(chunk, lower)
        self.arrive(chunk, level, slots[0])
        self.counters.add_stored(tier.name, tier.slot_bytes)
        self.counters.promoted_chunks += 1
        return True

    def arrive(self, chunk: ChunkId, level: int, slot: SlotId) -> None:
        """Book that a tier holds a chunk now, readable."""
        self.table[chunk].slots[level] = slot
        self._policies[level].insert(chunk)
        self._peaks[level] = max(self._peaks[level], self.tiers[level].used_bytes)
        self._note_move(chunk)

    def drop_copy(self, chunk: ChunkId, level: int) -> None:
        """Free the slot of a chunk in one tier; it has to have another copy."""
        self.tiers[level].free([self.table[chunk].slots.pop(level)])
        self._policies[level].remove(chunk)
        self._note_move(chunk)

    def shrink(self, level: int, num_slots: int) -> None:
        """Shrink a memory tier to ``num_slots``, moving what no longer fits one tier down.

        Raises
        ------
        CapacityError
            The tiers below are full. The tier may have shrunk part of the way.
        """
        tier = self.tiers[level]
        assert isinstance(tier, PooledTier)
        tier.pool.shrink(num_slots)
        slot_of = {chunk: self.table[chunk].slots.get(level, -1) for chunk in self.table}
        for chunk in [chunk for chunk, slot in slot_of.items() if slot >= num_slots]:
            if tier.num_free:
                self._move(chunk, level, level)
            else:
                self.demote(chunk, level)

    def reap(self) -> None:
        """Book the stores that have finished; raises if one failed."""
        if self._queue is not None:
            self._queue.reap()

    def drain(self) -> None:
        """Wait for every store in flight; raises if one failed."""
        if self._queue is not None:
            self._queue.drain()

    def peak_bytes(self, level: int) -> int:
        """Return the most bytes a tier has held, stores in flight included."""
        known = max(self._peaks[level], self.tiers[level].used_bytes)
        if self._queue is not None and level == len(self.tiers) - 1:
            return max(self._queue.peak_bytes, known)
        return known

    def restart_peaks(self) -> None:
        """Count peaks from what the tiers hold now."""
        self._peaks = [tier.used_bytes for tier in self.tiers]

    def check_integrity(self) -> None:
        """Raise AssertionError if a tier or the table is inconsistent."""
        for tier in self.tiers:
            tier.check_integrity()
        self.table.check_integrity()

    def close(self) -> None:
        """Wait for what is in flight and close every tier, whatever fails. Idempotent."""
        for tier in reversed(self.tiers):
            tier.close()

    def positions_with_room(
        self, level: int, wanted: int, batch: int, stream: int | None = None
    ) -> int:
        """Return how many positions of ``batch`` chunks fit now, after the policy made room.

        With ``stream``, only those that fit into its share.
        """
        tier = self.tiers[level]
        missing = wanted * batch - tier.num_free
        if missing > 0 and level + 1 == len(self.tiers):
            for chunk in second_copies(self.tiers, self.table)[:missing]:
                self.drop_copy(chunk, level)
        elif missing > 0:
            for victim in self._policies[level].victims(missing, self.table.protected):
                self.demote(victim, level)
        free = tier.num_free if stream is None else tier.num_free_for(stream, batch)
        return min(wanted, free // batch)

    def _place(
        self, level: int, layer: int, first_token: int, source: ChunkSource
    ) -> list[list[ChunkId]]:
        """Store ``[batch, num_chunks, ...]`` in one tier; the room is there."""
        batch, count = source.keys.shape[:2]
        step = self.layout.chunk_tokens
        ids = [
            [self.table.create(layer, first_token + i * step) for _ in range(batch)]
            for i in range(count)
        ]
        flat = [chunk for row in ids for chunk in row]
        tier = self.tiers[level]
        if isinstance(tier, PooledTier):
            slots = tier.allocate(len(flat), stream=layer)
            infos = [self.table[chunk].info for chunk in flat]
            fill_slots(tier, slots, infos, source, self.layout)
            self.counters.add_stored(tier.name, len(slots) * tier.slot_bytes)
            for chunk, slot in zip(flat, slots, strict=True):
                self.arrive(chunk, level, slot)
            return ids
        try:
            self._write_behind(flat, source)
        except BaseException:
            self._bury_unplaced(flat)
            raise
        return ids

    def _write_behind(self, chunks: list[ChunkId], source: ChunkSource) -> None:
        assert self._queue is not None
        for start in range(0, len(chunks), self._queue.burst):
            part = chunks[start : start + self._queue.burst]
            buffers = self._queue.take_buffers(len(part))
            for i, buffer in enumerate(buffers, start):
                source.fill_one(as_chunk(buffer, self.layout), i, self.layout)
            self._queue.submit(part, buffers)

    def _bury_unplaced(self, chunks: list[ChunkId]) -> None:
        """Undo the creation of chunks whose call failed half-way."""
        for chunk in chunks:
            if not self.table[chunk].slots and self.table[chunk].pending is None:
                self.table.forget(chunk)
            else:
                self.release([chunk])

    def demote(self, chunk: ChunkId, level: int) -> None:
        """Move a chunk down; one that has a copy below needs no room there."""
        is_below = any(lower > level for lower in self.table[chunk].slots)
        self._move(chunk, level, level + 1 if is_below else self._level_below(level))

    def _move(self, chunk: ChunkId, level: int, target: int) -> None:
        """Move a chunk from a memory tier to a slot in ``target``, which has room."""
        entry = self.table[chunk]
        source, tier = self.tiers[level], self.tiers[target]
        self.counters.demoted_chunks += target != level
        if any(lower > level for lower in entry.slots):
            self.drop_copy(chunk, level)
        elif isinstance(tier, PooledTier):
            slots = tier.allocate(1, stream=entry.info.layer)
            copy_slot(source, entry.slots[level], entry.info, tier, slots[0])
            self.counters.add_stored(tier.name, tier.slot_bytes)
            self.drop_copy(chunk, level)
            self.arrive(chunk, target, slots[0])
        else:
            assert self._queue is not None
            [buffer] = self._queue.take_buffers(1)
            settle()  # the content may itself be on its way down from a CUDA device
            copy_down(source, entry.slots[level], entry.info, buffer)
            self._queue.submit([chunk], [buffer])
            self.drop_copy(chunk, level)

    def _rescue(self, chunk: ChunkId) -> bool:
        """Copy a chunk from its write buffer into a free slot in memory, if there is one."""
        entry = self.table[chunk]
        assert entry.pending is not None
        for level, tier in enumerate(self.tiers[:-1]):
            if tier.num_free:
                slots = tier.allocate(1, stream=entry.info.layer)
                tier.write(slots, [entry.info], [entry.pending]).wait(self.deadline_s)
                settle()  # the buffer is about to be filled with something else
                self.counters.add_stored(tier.name, tier.slot_bytes)
                self.arrive(chunk, level, slots[0])
                return True
        return False

    def _level_below(self, level: int) -> int:
        """Return the next level down with a free slot, after its policy made room."""
        for lower in range(level + 1, len(self.tiers)):
            if self.positions_with_room(lower, 1, 1):
                return lower
        raise no_room(self.tiers, 1)

    def _bury(self, dead: Iterable[ChunkId]) -> None:
        for chunk in dead:
            entry = self.table.forget(chunk)
            for level, slot in entry.slots.items():
                self.tiers[level].free([slot])
                self._policies[level].remove(chunk)
            if entry.pending is not None and self._queue is not None:
                self._queue.give_back(entry.pending)
            self._note_move(chunk)

    def _note_move(self, chunk: ChunkId) -> None:
        self.version += 1
        for moved in self._watchers:
            moved(chunk)
