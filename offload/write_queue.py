"""Chunks on their way to the disk: bounded buffers, background writes, backpressure."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.errors import OffloadError, StorageError
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
    next store waits. After a failed store its chunks go to a faster tier where there is room; the
    others are held in their buffers, readable, and the error is raised. The queue goes on with the
    buffers that are left. Held chunks get another chance when buffers are short, and at ``drain``.

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
    rescue : callable
        Called with a chunk that the disk refused; copies it from its buffer into a faster tier and
        returns True, or returns False if there is no room.
    describe_room : callable
        Returns how full every tier is, for messages.
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
        rescue: Callable[[ChunkId], bool],
        describe_room: Callable[[], str],
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
        self._rescue = rescue
        self._describe_room = describe_room
        self._refused: list[ChunkId] = []
        self._writes: deque[_Write] = deque()

    def take_buffers(self, n: int) -> list[Tensor]:
        """Return ``n`` free buffers, waiting for earlier stores if need be (backpressure).

        Raises
        ------
        StorageError, DiskFull, TransferTimeout
            An earlier store failed, or failed again.
        CapacityError
            No tier has a slot for a chunk that the disk refused earlier.
        """
        self.reap()
        started = time.perf_counter()
        while len(self._free) < n:
            if self._writes:
                self._finish_oldest()
            else:
                assert self._refused, "more buffers asked for than there are"
                self._store_held()
        self._counters.store_wait_s += time.perf_counter() - started
        return [self._free.popleft() for _ in range(n)]

    def give_back(self, buffer: Tensor) -> None:
        """Take back the buffer of a chunk that died before it reached the disk."""
        self._free.append(buffer)

    def submit(self, chunks: list[ChunkId], buffers: list[Tensor]) -> None:
        """Start writing filled buffers; on an error nothing was handed over."""
        try:
            self._start(chunks, buffers)
        except BaseException:
            self._free.extend(buffers)
            raise

    def reap(self) -> None:
        """Book the stores that have finished; raises if one of them failed."""
        while self._writes and self._writes[0].transfer.done():
            self._finish_oldest()

    def drain(self) -> None:
        """Wait for every store, those that failed earlier included; raises if one failed."""
        self._finish_all()
        self._store_held()
        self._finish_all()

    def _start(self, chunks: list[ChunkId], buffers: list[Tensor]) -> None:
        slots: list[SlotId] = []
        infos = [self._table[chunk].info for chunk in chunks]
        try:
            slots = self._tier.allocate(len(chunks), stream=infos[0].layer)
            self.peak_bytes = max(self.peak_bytes, self._tier.used_bytes)
            settle()
            transfer = self._tier.write(slots, infos, buffers)
        except BaseException:
            self._tier.free(slots)
            raise
        for chunk, buffer in zip(chunks, buffers, strict=True):
            self._table[chunk].pending = buffer
        self._table.protect(chunks)
        self._writes.append(_Write(chunks, slots, buffers, transfer))

    def _finish_all(self) -> None:
        """Wait for every store in flight; then raises if one failed, the last error for all."""
        failure: OffloadError | None = None
        while self._writes:
            try:
                self._finish_oldest()
            except TimeoutError:
                raise
            except OffloadError as error:
                failure = error
        if failure is not None:
            raise failure

    def _finish_oldest(self) -> None:
        write = self._writes[0]
        try:
            write.transfer.wait(self._deadline_s)
        except TimeoutError:
            raise  # still in flight: the buffers are not ours to touch
        except Exception as error:
            self._writes.popleft()
            self._take_back(write, error)
            return
        self._writes.popleft()
        self._counters.add_stored(self._tier.name, len(write.slots) * self._tier.slot_bytes)
        for chunk, slot in zip(write.chunks, write.slots, strict=True):
            self._table[chunk].pending = None
            self._on_stored(chunk, slot)
        self._free.extend(write.buffers)
        self._on_idle(write.chunks)

    def _take_back(self, write: _Write, error: Exception) -> None:
        """Find another place for the chunks of a failed store; raises if one has none."""
        self._counters.failed_stores += 1
        self._tier.free(write.slots)
        is_needed = any(self._table[chunk].ref_count for chunk in write.chunks)
        self._on_idle(write.chunks)
        if not is_needed:
            # Chunks of a step that was undone: its own error has been raised.
            self._counters.unneeded_failures += 1
            return
        self._refused += write.chunks
        self._rescue_held()
        if self._refused and isinstance(error, StorageError):
            raise type(error)(
                error.errno,
                f"{error.strerror}; {len(self._refused)} chunks are held in write buffers because "
                f"no faster tier has room; {self._describe_room()}",
            ) from error
        if self._refused:
            raise error

    def _rescue_held(self) -> None:
        """Move held chunks to faster tiers, as many as there is room for; forget the dead ones."""
        left = []
        for chunk, buffer in self._held():
            if self._rescue(chunk):
                self._counters.rescued_chunks += 1
                self._table[chunk].pending = None
                self._free.append(buffer)
            else:
                left.append(chunk)
        self._refused = left

    def _store_held(self) -> None:
        """Give held chunks another chance, on a faster tier or else on the disk."""
        self._rescue_held()
        if self._refused:
            buffers = [buffer for _, buffer in self._held()]
            self._start(self._refused, buffers)
            self._refused = []

    def _held(self) -> list[tuple[ChunkId, Tensor]]:
        """Return the chunks that have no place but their buffers, unless they died meanwhile."""
        entries = [(chunk, self._table[chunk]) for chunk in self._refused if chunk in self._table]
        return [(chunk, entry.pending) for chunk, entry in entries if entry.pending is not None]


def settle() -> None:
    """Wait until copies from a CUDA device into host buffers have landed."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
