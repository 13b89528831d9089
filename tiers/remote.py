"""The remote tier: chunks as objects in an object store, each verified when it is read."""

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from functools import partial

from torch import Tensor

from offload.errors import CapacityError, ClosedError, ConfigError
from offload.tiers.base import Tier
from offload.tiers.buffers import Buffer, Buffers
from offload.tiers.io_engine import IoEngine, Job
from offload.tiers.record import RecordFormat
from offload.tiers.record_parts import first_parts
from offload.tiers.remote_bucket import Bucket
from offload.tiers.remote_chunks import RemoteChunks
from offload.tiers.requests import check_buffers, describe, no_record
from offload.tiers.transfer import FutureTransfer, Transfer
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout, SlotId


class RemoteTier(Tier):
    """A tier below one URL of an object store.

    A slot is one object, which is created once, under a name that is never used again, and removed
    when the slot is freed or written again. Objects are for this tier only: what sessions share is
    published by ``RemoteSessions``. A chunk of its own per object makes more requests than several
    together would, and gives back every byte at once when it is freed.

    A slot can be read from when its object is written. A read that finds damage is repeated once,
    because the damage may have happened on the way; what is still damaged raises CorruptChunk.

    Parameters
    ----------
    bucket : Bucket
        Closed with the tier.
    capacity_bytes : int
        Hard limit; a slot counts as a chunk that compression saves nothing of.
    layout : ChunkLayout
    fingerprint : bytes
        Identity of the model, at most 16 bytes; an object of another model is corrupt.
    num_threads : int
        Requests under way at a time.
    deadline_s : float
        Longest wait for room in the queue, and for requests under way at ``close``.
    compress : bool
        Without loss, with zstandard level 1, where that saves 5 %.
    """

    name = "remote"

    def __init__(
        self,
        bucket: Bucket,
        *,
        capacity_bytes: int,
        layout: ChunkLayout,
        fingerprint: bytes = b"",
        num_threads: int = 16,
        deadline_s: float = 120.0,
        compress: bool = True,
    ) -> None:
        fmt = RecordFormat(layout)
        self.capacity_bytes = capacity_bytes
        self.layout = layout
        self.slot_bytes = layout.slot_bytes
        self.record_bytes = PAGE_BYTES + layout.slot_bytes
        self.part_bytes = fmt.unit_bytes
        self.parts_per_head = fmt.units_per_head
        self._chunks = RemoteChunks(bucket, layout, fingerprint, compress=compress)
        self._num_slots = capacity_bytes // self.record_bytes
        self._lock = threading.Lock()
        self._slots: dict[SlotId, str | None] = {}
        """Allocated slots, and the name of the object of those that can be read."""
        self._next_slot = 0
        self._closed = False
        self._engine = IoEngine(num_threads, deadline_s=deadline_s)

    @property
    def num_left_behind(self) -> int:
        """Objects of freed slots that could not be removed; ``close`` tries again."""
        return self._chunks.num_left_behind

    @property
    def num_slots(self) -> int:
        """Slots the capacity allows."""
        return self._num_slots

    @property
    def num_free(self) -> int:
        """Slots that ``allocate`` could hand out now."""
        return self._num_slots - len(self._slots)

    @property
    def used_bytes(self) -> int:
        """Most bytes that the objects of the allocated slots may have."""
        return len(self._slots) * self.record_bytes

    def allocate(self, n: int, stream: int = 0) -> list[SlotId]:
        """Take ``n`` slots; see ``Tier``. Nothing is asked of the store."""
        with self._lock:
            self._check_open()
            if n > self.num_free:
                raise CapacityError(
                    f"remote tier full: {n} slots asked for, {self.num_free} of "
                    f"{self._num_slots} free ({self.record_bytes} bytes each)"
                )
            slots = [SlotId(self._next_slot + i) for i in range(n)]
            self._next_slot += n
            self._slots.update(dict.fromkeys(slots))
            return slots

    def free(self, slots: Collection[SlotId]) -> None:
        """Give slots back; their objects are removed in the background."""
        with self._lock:
            if self._closed:
                return  # close gave everything back
            names = [self._slots.pop(slot) for slot in slots]
        self._remove([name for name in names if name is not None])

    def read(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], out: Sequence[Tensor]
    ) -> Transfer:
        """Read and verify whole chunks; see ``Tier``."""
        check_buffers(slots, infos, out, self.slot_bytes)
        buffers = [Buffer.of(buffer).part(0, self.layout.chunk_bytes) for buffer in out]
        starts = [0] * len(slots)
        return self._start_read("read", slots, infos, buffers, starts, self.slot_bytes)

    def read_parts(
        self,
        slots: Sequence[SlotId],
        infos: Sequence[ChunkInfo],
        parts: slice | Sequence[int],
        out: Sequence[Tensor] | Buffers,
        *,
        num_parts: int = 1,
        urgent: bool = True,
    ) -> Transfer:
        """Copy parts of slots into buffers; see ``DiskTier.read_parts``.

        Every chunk is read whole: it is compressed as a whole, and a request takes longer than its
        bytes.
        """
        total = self.layout.num_kv_heads * self.parts_per_head
        firsts, count = first_parts(parts, num_parts, len(slots), total)
        num_bytes = count * self.part_bytes
        check_buffers(slots, infos, out, num_bytes)
        buffers = list(Buffers.of(out))
        starts = [first * self.part_bytes for first in firsts]
        return self._start_read(
            "read of parts", slots, infos, buffers, starts, num_bytes, urgent=urgent
        )

    def write(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], src: Sequence[Tensor]
    ) -> Transfer:
        """Write whole chunks; see ``Tier``. A slot cannot be read until this is done."""
        check_buffers(slots, infos, src, self.slot_bytes)
        jobs: list[Job] = []
        with self._lock:
            self._check_open()
            strange = [slot for slot in slots if slot not in self._slots]
            if strange:
                raise ConfigError(f"remote tier: slot {strange[0]} is not allocated")
            old = [name for slot in slots if (name := self._slots[slot]) is not None]
            self._slots.update(dict.fromkeys(slots))
            for slot, info, source in zip(slots, infos, src, strict=True):
                name = self._chunks.new_name()
                jobs.append(partial(self._write_one, slot, info, source, name))
        self._remove(old)
        what = describe(self.name, "write", infos)
        return self._start(what, len(slots) * self.slot_bytes, jobs, urgent=False)

    def check_integrity(self) -> None:
        """Raise AssertionError if the invariant does not hold."""
        with self._lock:
            assert self.used_bytes <= self.capacity_bytes
            names = [name for name in self._slots.values() if name is not None]
            assert len(set(names)) == len(names), "two slots have one object"

    def close(self) -> None:
        """Finish what is under way, then remove every object of the tier. Idempotent.

        Raises
        ------
        TransferTimeout
            A request did not end within ``deadline_s``.
        StorageError
            Objects could not be removed; names the prefix where they are.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._slots.clear()
        try:
            self._engine.close()
        finally:
            self._chunks.close()

    def _start_read(
        self,
        verb: str,
        slots: Sequence[SlotId],
        infos: Sequence[ChunkInfo],
        out: Sequence[Buffer],
        starts: Sequence[int],
        bytes_each: int,
        *,
        urgent: bool = True,
    ) -> Transfer:
        what, num_bytes = describe(self.name, verb, infos), len(slots) * bytes_each
        jobs: list[Job] = []
        with self._lock:
            self._check_open()
            missing = [slot for slot in slots if self._slots.get(slot) is None]
            for slot, info, buffer, start in zip(slots, infos, out, starts, strict=True):
                name = self._slots.get(slot)
                if name is not None:
                    jobs.append(partial(self._read_one, name, info, buffer, start))
        if missing:
            failed: Future[None] = Future()
            failed.set_exception(no_record(what, missing, len(slots)))
            return FutureTransfer(what, num_bytes, [failed])
        return self._start(what, num_bytes, jobs, urgent=urgent)

    def _start(self, what: str, num_bytes: int, jobs: Sequence[Job], *, urgent: bool) -> Transfer:
        futures = self._engine.submit(jobs, urgent=urgent, what=what)
        return FutureTransfer(what, num_bytes, futures, withdraw=self._engine.withdraw)

    def _write_one(
        self, slot: SlotId, info: ChunkInfo, source: Tensor, name: str, _: memoryview
    ) -> None:
        self._chunks.write(name, info, source)
        with self._lock:
            is_late = slot not in self._slots  # freed, or the tier was closed
            if not is_late:
                self._slots[slot] = name
        if is_late:
            self._chunks.remove([name])

    def _read_one(self, name: str, info: ChunkInfo, out: Buffer, start: int, _: memoryview) -> None:
        chunk = self._chunks.read(name, info)
        out.bytes[:] = chunk[start : start + len(out.bytes)]

    def _remove(self, names: Sequence[str]) -> None:
        if names and not self._closed:
            self._engine.submit([lambda _: self._chunks.remove(names)], urgent=False)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the remote tier is closed")
