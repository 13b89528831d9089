"""Chunks on their way to the disk: bounded buffers, background writes, backpressure."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.errors import StorageError
from offload.stats import Counters
from offload.table import ChunkTable
from offload.tiers.base import Tier
from offload.tiers.transfer import Transfer
from offload.types import ChunkId, SlotId


@dataclass(slots=True)
class _Write:
    chunks: list[ChunkId]
    slots: list[SlotId]
    buffers: list[Tensor]
    transfer: Transfer


class WriteQueue:
    """Stores to one disk tier, in flight.

    A chunk handed over stays readable from its buffer (``Entry.pending``) until its record is on
    disk, and protected meanwhile. The number of buffers bounds memory: when all are in flight, the
    next store waits. After a failed store its chunks stay in their buffers, readable, and the
    queue goes on with the buffers that are left.

    Only the thread that runs the model calls methods; the disk tier's threads do the writing.

    Parameters
    ----------
    tier : Tier
    table : ChunkTable
    buffers : sequence of Tensor, uint8 [slot_bytes]
        Page-aligned host memory.
    counters : Counters
    deadline_s : float
    on_stored : callable
        Called with (chunk, slot) when a record can be read from the disk.
    on_idle : callable
        Called with the chunks that a finished or failed store no longer protects.
    """

    def __init__(
        self,
        tier: Tier,
        table: ChunkTable,
        buffers: Sequence[Tensor],
        counters: Counters,
        deadline_s: float,
        on_stored: Callable[[ChunkId, SlotId], None],
        on_idle: Callable[[list[ChunkId]], None],
    ) -> None:
        self.burst = max(1, len(buffers) // 2)
        """Chunks per write: half the buffers, so that one burst fills while another drains."""
        self.peak_bytes = 0
        """Most bytes the tier has held."""
        self._tier = tier
        self._table = table
        self._free = deque(buffers)
        self._counters = counters
        self._deadline_s = deadline_s
        self._on_stored = on_stored
        self._on_idle = on_idle
        self._writes: deque[_Write] = deque()

    def take_buffers(self, n: int) -> list[Tensor]:
        """Return ``n`` free buffers, waiting for earlier stores if need be (backpressure).

        Raises
        ------
        StorageError, DiskFull, TransferTimeout
            An earlier store failed, or failed stores have used up the buffers.
        """
        self.reap()
        started = time.perf_counter()
        while len(self._free) < n:
            if not self._writes:
                raise StorageError(
                    f"{n} write buffers needed, {len(self._free)} left: the others hold chunks "
                    "that the disk refused earlier"
                )
            self._finish_oldest()
        self._counters.store_wait_s += time.perf_counter() - started
        return [self._free.popleft() for _ in range(n)]

    def give_back(self, buffer: Tensor) -> None:
        """Take back the buffer of a chunk that died before it reached the disk."""
        self._free.append(buffer)

    def submit(self, chunks: list[ChunkId], buffers: list[Tensor]) -> None:
        """Start writing filled buffers; on an error nothing was handed over."""
        slots: list[SlotId] = []
        infos = [self._table[chunk].info for chunk in chunks]
        try:
            slots = self._tier.allocate(len(chunks), stream=infos[0].layer)
            self.peak_bytes = max(self.peak_bytes, self._tier.used_bytes)
            settle()
            transfer = self._tier.write(slots, infos, buffers)
        except BaseException:
            self._tier.free(slots)
            self._free.extend(buffers)
            raise
        for chunk, buffer in zip(chunks, buffers, strict=True):
            self._table[chunk].pending = buffer
        self._table.protect(chunks)
        self._writes.append(_Write(chunks, slots, buffers, transfer))

    def reap(self) -> None:
        """Book the stores that have finished; raises if one of them failed."""
        while self._writes and self._writes[0].transfer.done():
            self._finish_oldest()

    def drain(self) -> None:
        """Wait for every store; raises if one failed."""
        while self._writes:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        write = self._writes[0]
        try:
            write.transfer.wait(self._deadline_s)
        except TimeoutError:
            raise  # still in flight: the buffers are not ours to touch
        except BaseException:
            self._writes.popleft()
            self._tier.free(write.slots)
            is_needed = any(self._table[chunk].ref_count for chunk in write.chunks)
            self._on_idle(write.chunks)
            if is_needed:
                raise
            return  # chunks of a step that was undone: its own error has been raised
        self._writes.popleft()
        self._counters.add_stored(self._tier.name, len(write.slots) * self._tier.slot_bytes)
        for chunk, slot in zip(write.chunks, write.slots, strict=True):
            self._table[chunk].pending = None
            self._on_stored(chunk, slot)
        self._free.extend(write.buffers)
        self._on_idle(write.chunks)


def settle() -> None:
    """Wait until copies from a CUDA device into host buffers have landed."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
