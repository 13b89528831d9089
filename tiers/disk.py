"""The disk tier: chunks as self-describing records in append-only segment files."""

import os
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from offload.errors import CapacityError, ClosedError, ConfigError, CorruptChunk
from offload.tiers.base import Tier
from offload.tiers.io_engine import (
    IoEngine,
    VectoredCall,
    read_fully,
    supports_direct_io,
    write_fully,
)
from offload.tiers.io_plan import Extent, Operation, plan_io
from offload.tiers.record import (
    RecordFormat,
    check_header,
    check_heads,
    digest_heads,
    pack_header,
    verify,
)
from offload.tiers.segment import SegmentFiles, SegmentTable
from offload.tiers.transfer import FutureTransfer, Transfer
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout, SlotId

_BUFFERS_PER_RECORD = 2


class DiskTier(Tier):
    """A tier in a directory.

    A slot can be read once all of its record is written, until it is freed or written again; every
    read verifies the record's checksums. Freeing gives the space back at once where the file system
    punches holes, else when the last record of the segment is freed. A slot must not be freed while
    a transfer uses it.

    Page-aligned buffers bypass the page cache (``O_DIRECT``) where the file system allows it; others
    go through it. Nothing is synced to the device: records live as long as the tier.

    Parameters
    ----------
    directory : Path
        Made, for the owner only, if it is missing.
    capacity_bytes : int
        Hard limit, header pages and dead records not yet given back included.
    layout : ChunkLayout
    fingerprint : bytes
        Identity of the model, at most 16 bytes; a record of another model is corrupt.
    num_threads : int
    segment_bytes : int
        Size at which a stream goes on in a new segment file.
    deadline_s : float
        Longest wait for room in the I/O queue, and for transfers in flight at ``close``.
    preadv, pwritev : callable
        The system calls; replaceable to see what a failing disk does.

    Raises
    ------
    ConfigError
        The directory cannot be used, or the layout or fingerprint does not fit into a record.
    """

    name = "disk"

    def __init__(
        self,
        directory: Path,
        *,
        capacity_bytes: int,
        layout: ChunkLayout,
        fingerprint: bytes = b"",
        num_threads: int = 4,
        segment_bytes: int = 1 << 30,
        deadline_s: float = 60.0,
        preadv: VectoredCall = os.preadv,
        pwritev: VectoredCall = os.pwritev,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.layout = layout
        self.slot_bytes = layout.slot_bytes
        self._format = RecordFormat(layout, fingerprint)
        self._per_segment = max(1, segment_bytes // self.record_bytes)
        self._table = SegmentTable(capacity_bytes // self.record_bytes, self._per_segment)
        self._files = SegmentFiles(directory)
        self.is_direct = supports_direct_io(directory)
        self._preadv = preadv
        self._pwritev = pwritev
        self._lock = threading.Lock()
        self._written: set[SlotId] = set()
        self._closed = False
        self._engine = IoEngine(num_threads, deadline_s=deadline_s)

    @property
    def record_bytes(self) -> int:
        """Bytes a slot takes up on disk: its header page and ``slot_bytes``."""
        return self._format.record_bytes

    @property
    def num_slots(self) -> int:
        return self._table.num_slots

    @property
    def num_free(self) -> int:
        return self._table.num_slots - self._table.num_used

    @property
    def used_bytes(self) -> int:
        return self._table.num_used * self.record_bytes

    def allocate(self, n: int, stream: int = 0) -> list[SlotId]:
        with self._lock:
            self._check_open()
            try:
                return self._table.allocate(n, stream)
            except CapacityError as error:
                raise CapacityError(
                    f"disk tier full: {error} ({self.record_bytes} bytes each)"
                ) from None

    def free(self, slots: Collection[SlotId]) -> None:
        with self._lock:
            if self._closed:
                return
            self._written.difference_update(slots)
            freed = self._table.free(slots)
            for hole in freed.holes:
                offset, num_bytes = hole.first * self.record_bytes, hole.count * self.record_bytes
                if self._files.punch(hole.segment, offset, num_bytes):
                    self._table.punched(hole)
            for segment in freed.dead_segments:
                self._files.unlink(segment)

    def read(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], out: Sequence[Tensor]
    ) -> Transfer:
        self._check_buffers(slots, infos, out, self.slot_bytes)
        what = _describe("read", infos)
        with self._lock:
            self._check_open()
            missing = self._first_missing(slots, infos)
        if missing is not None:
            return _failed(what, missing)
        jobs = [
            partial(self._read_records, op, infos, out) for op in self._plan(slots)
        ]
        futures = self._engine.submit(jobs, urgent=True)
        return FutureTransfer(what, len(slots) * self.slot_bytes, futures)

    def read_heads(
        self,
        slots: Sequence[SlotId],
        infos: Sequence[ChunkInfo],
        heads: slice,
        out: Sequence[Tensor],
    ) -> Transfer:
        """Copy consecutive KV heads of slots into buffers, reading nothing else but the headers.

        Parameters
        ----------
        slots, infos : sequences of equal length
        heads : slice
            Consecutive KV heads, the same of every slot.
        out : sequence of Tensor, uint8 [num_heads * head_bytes]
            Page-aligned to bypass the page cache, which also takes heads of whole pages.

        Returns
        -------
        Transfer
            Fails as that of ``read`` does; only the heads that were read are verified.
        """
        first, stop, step = heads.indices(self.layout.num_kv_heads)
        if step != 1 or stop <= first:
            raise ConfigError(f"{heads} are not consecutive heads of {self.layout.num_kv_heads}")
        self._check_buffers(slots, infos, out, (stop - first) * self._format.head_bytes)
        what = _describe(f"read of heads {first} to {stop - 1}", infos)
        with self._lock:
            self._check_open()
            missing = self._first_missing(slots, infos)
        if missing is not None:
            return _failed(what, missing)
        jobs = [
            partial(self._read_head_slice, slot, info, first, target)
            for slot, info, target in zip(slots, infos, out, strict=True)
        ]
        num_bytes = sum(target.numel() for target in out)
        return FutureTransfer(what, num_bytes, self._engine.submit(jobs, urgent=True))

    def write(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], src: Sequence[Tensor]
    ) -> Transfer:
        self._check_buffers(slots, infos, src, self.slot_bytes)
        with self._lock:
            self._check_open()
            for slot in slots:
                if not self._table.holds(slot):
                    raise ConfigError(f"disk tier: slot {slot} is not allocated")
            self._written.difference_update(slots)
        jobs = [
            partial(self._write_records, op, slots, infos, src) for op in self._plan(slots)
        ]
        futures = self._engine.submit(jobs, urgent=False)
        return FutureTransfer(
            _describe("write", infos), len(slots) * self.slot_bytes, futures
        )

    def check_integrity(self) -> None:
        with self._lock:
            self._table.check_integrity()
            assert all(self._table.holds(slot) for slot in self._written)
            assert self.used_bytes <= self.capacity_bytes

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._engine.close()
        finally:
            for segment in self._table.segments:
                self._files.unlink(segment)
            self._table = SegmentTable(0, self._per_segment)
            self._written.clear()
