"""Bring ranges of tokens of one layer together, from wherever their chunks lie."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from offload.engine import Engine
from offload.errors import OffloadError
from offload.tiers.coded import CodedTier
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import as_chunk
from offload.tiers.transfer import Transfer
from offload.types import ChunkId
from offload.write_queue import settle

_BATCH_CHUNKS = 32
"""Chunks of one transfer: while one is copied to its place, the disk reads the next ones. 64 and 16
were slower (medians of 8 reads of 128 chunks of 200 KiB by each of 12 layers, a busy machine)."""

Piece = tuple[range, int]
"""Tokens inside of a chunk, and where the first of them goes."""


class ReadMeter(Protocol):
    """Told what came from where, and for how long the caller stood still for it."""

    def __call__(self, tier: str, num_bytes: int, seconds: float) -> object:
        """Add bytes and seconds to those of a tier."""
        ...


@dataclass(frozen=True, slots=True)
class _Batch:
    transfer: Transfer
    chunks: list[tuple[int, Tensor]]
    """Position of each chunk, and the buffer that it comes to."""


class RangeRead:
    """A read under way. What lies in memory has been copied; the disk reads behind.

    Its chunks keep their places until ``wait`` or ``abandon``, one of which must be called.

    Parameters
    ----------
    engine : Engine
        Its lock is held by the caller.
    row : sequence of ChunkId
        Chunks of the layer, by position; what lies behind them is in ``tail``.
    tail : Tensor, shape (num_kv_heads, chunk_tokens, row_dim)
    wanted : mapping of int to sequence of (range, int)
        By position of the chunk.
    out : Tensor, shape (num_kv_heads, num_tokens, row_dim)
        On the model's device.
    take_memory : callable
        Returns page-aligned host memory of so many bytes.
    meter : ReadMeter
    """

    def __init__(
        self,
        engine: Engine,
        row: Sequence[ChunkId],
        tail: Tensor,
        wanted: Mapping[int, Sequence[Piece]],
        out: Tensor,
        take_memory: Callable[[int], Tensor],
        meter: ReadMeter,
    ) -> None:
        self._engine, self._store, self._layout = engine, engine.store, engine.layout
        self._row, self._wanted, self._out, self._meter = row, wanted, out, meter
        self._batches: list[_Batch] = []
        stored = sorted(position for position in wanted if position < len(row))
        self._store.reap()
        self._protected = [row[position] for position in stored]
        self._store.table.protect(self._protected)
        try:
            near = [position for position in stored if self._near(position) is not None]
            far = sorted(set(stored).difference(near))
            self.memory = take_memory(len(far) * self._layout.slot_bytes)
            self._start(far)
            self._copy_near(near)
            for position in set(wanted).difference(stored):
                self._place(position, tail)
        except BaseException:
            self.abandon()
            raise

    def wait(self, deadline_s: float) -> None:
        """Block until everything is in its place.

        Raises
        ------
        CorruptChunk, StorageError, TransferTimeout
            Nothing of the read is under way any more, but for one that timed out.
        """
        try:
            for batch in self._batches:
                started = time.perf_counter()
                batch.transfer.wait(deadline_s)
                for position, buffer in batch.chunks:
                    self._place(position, as_chunk(buffer, self._layout))
                num_bytes = len(batch.chunks) * self._layout.chunk_bytes
                self._meter("disk", num_bytes, time.perf_counter() - started)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let what is under way end, and give up the chunks. Idempotent."""
        batches, self._batches = self._batches, []
        for batch in batches:
            with suppress(OffloadError):  # whoever waited for it has been told
                batch.transfer.wait(self._store.deadline_s)
        protected, self._protected = self._protected, []
        with self._engine.lock:
            self._store.unprotect(protected)

    def _near(self, position: int) -> tuple[str, Tensor] | None:
        """Return tier and bytes of a chunk that is in memory."""
        entry = self._store.table[self._row[position]]
        if entry.pending is not None:
            return "cpu", entry.pending
        level = min(entry.slots)
        tier = self._store.tiers[level]
        slot = entry.slots[level]
        if isinstance(tier, MemoryTier):
            return tier.name, tier.buffer(slot)
        if isinstance(tier, CodedTier):
            return tier.name, tier.decoded(np.array([slot])).view(-1).view(torch.uint8)
        return None

    def _start(self, positions: Sequence[int]) -> None:
        table, disk = self._store.table, len(self._store.tiers) - 1
        buffers = list(
            self.memory[: len(positions) * self._layout.slot_bytes].view(
                -1, self._layout.slot_bytes
            )
        )
        for start in range(0, len(positions), _BATCH_CHUNKS):
            some = positions[start : start + _BATCH_CHUNKS]
            into = buffers[start : start + len(some)]
            entries = [table[self._row[position]] for position in some]
            slots, infos = [each.slots[disk] for each in entries], [each.info for each in entries]
            transfer = self._store.tiers[disk].read(slots, infos, into)
            self._batches.append(_Batch(transfer, list(zip(some, into, strict=True))))

    def _copy_near(self, positions: Sequence[int]) -> None:
        settle()  # a copy from the device into host memory may still be on its way
        for position in positions:
            found = self._near(position)
            assert found is not None
            name, content = found
            started = time.perf_counter()
            num_tokens = self._place(position, as_chunk(content, self._layout))
            num_bytes = num_tokens * self._layout.chunk_bytes // self._layout.chunk_tokens
            self._meter(name, num_bytes, time.perf_counter() - started)
        settle()  # the chunks may move as soon as nobody needs them

    def _place(self, position: int, rows: Tensor) -> int:
        """Copy what is wanted of a chunk to where it belongs; return how many tokens."""
        first, count = position * self._layout.chunk_tokens, 0
        for inside, place in self._wanted[position]:
            source = rows[:, inside.start - first : inside.stop - first]
            self._out[:, place : place + len(inside)] = source
            count += len(inside)
        return count
