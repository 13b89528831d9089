"""The disk tier: chunks as self-describing records in append-only segment files."""

import os
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from torch import Tensor

from offload.errors import CapacityError, ClosedError, ConfigError
from offload.stats import BusyTime
from offload.tiers.adopted import AdoptedFiles
from offload.tiers.aio import thread_queue
from offload.tiers.base import Tier
from offload.tiers.buffers import Buffers
from offload.tiers.io_engine import IoEngine, Job
from offload.tiers.io_plan import MIN_SHARE, Operation
from offload.tiers.read_meter import ReadMeter
from offload.tiers.record import RecordFormat
from offload.tiers.record_io import ChooseCodec, KnownHeaders, Place, RecordIo
from offload.tiers.record_part import Parts
from offload.tiers.record_parts import first_parts, plan_parts, read_parts
from offload.tiers.requests import check_buffers, describe, no_record
from offload.tiers.sealing import Sealer
from offload.tiers.segment import SegmentTable, locate
from offload.tiers.segment_files import SegmentFiles
from offload.tiers.syscalls import VectoredCall
from offload.tiers.transfer import FutureTransfer, Transfer
from offload.types import ChunkInfo, ChunkLayout, SlotId

_BATCH = 64
"""Parts that one thread reads at once: fewer leave the disk idle, more keep others waiting."""


class DiskTier(Tier):
    """A tier in a directory.

    A slot can be read once all of its record is written, until it is freed or written again; every
    read verifies the record's checksums. Freeing gives the space back at once where the file system
    punches holes, else when the last record of the segment is freed. A slot must not be freed while
    a transfer uses it.

    Page-aligned buffers bypass the page cache (``O_DIRECT``) where the file system allows it;
    others go through it. Nothing is synced to the device: records live as long as the tier.

    Records of other files can be adopted: they are read and verified like the tier's own, count
    for nothing in its capacity, and are never changed.

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
    choose_codec : callable, optional
        How each chunk is encoded when it is written, by default not at all. It takes as much of
        the capacity either way, because only the file system knows how much room is left.
    sealer : Sealer, optional
        Encrypts every record; parts are then read in units of 64 tokens.
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
        num_threads: int = 8,
        segment_bytes: int = 1 << 30,
        deadline_s: float = 60.0,
        choose_codec: ChooseCodec | None = None,
        sealer: Sealer | None = None,
        preadv: VectoredCall = os.preadv,
        pwritev: VectoredCall = os.pwritev,
    ) -> None:
        fmt = RecordFormat(layout, fingerprint, sealer)
        self.capacity_bytes = capacity_bytes
        self.layout = layout
        self.slot_bytes = layout.slot_bytes
        self.record_bytes = fmt.record_bytes
        per_segment = max(1, segment_bytes // self.record_bytes)
        self._table = SegmentTable(capacity_bytes // self.record_bytes, per_segment)
        self._files = SegmentFiles(directory)
        self._calls = (preadv, pwritev)
        self._headers: KnownHeaders = {}
        self.meter = ReadMeter()
        self._io = RecordIo(self._files, fmt, *self._calls, self._headers, choose_codec, self.meter)
        self.part_bytes = fmt.unit_bytes
        """Bytes of the smallest part that can be read and verified by itself."""
        self.parts_per_head = fmt.units_per_head
        is_batched = self._io.is_direct and preadv is os.preadv and thread_queue() is not None
        self._min_parts = _BATCH if is_batched else MIN_SHARE
        self._lock = threading.Lock()
        self._written: set[SlotId] = set()
        self._adopted = AdoptedFiles(self._files)
        self._closed = False
        self.reading = BusyTime()
        """Time during which at least one thread was reading."""
        self._engine = IoEngine(num_threads, deadline_s=deadline_s)

    @property
    def is_direct(self) -> bool:
        """Whether the file system lets page-aligned buffers bypass the page cache."""
        return self._io.is_direct

    @property
    def num_slots(self) -> int:
        """Records the capacity allows, header pages counted."""
        return self._table.num_slots

    @property
    def num_free(self) -> int:
        """Slots that ``allocate`` could hand out now; dead records still on disk are not free."""
        return self._table.num_slots - self._table.num_used

    @property
    def used_bytes(self) -> int:
        """Bytes of all allocated records, and of dead ones still on disk."""
        return self._table.num_used * self.record_bytes

    def allocate(self, n: int, stream: int = 0) -> list[SlotId]:
        """Take the next ``n`` positions of the stream's open segment; see ``Tier``."""
        with self._lock:
            self._check_open()
            try:
                return self._table.allocate(n, stream)
            except CapacityError as error:
                raise CapacityError(
                    f"disk tier full: {error} ({self.record_bytes} bytes each)"
                ) from None

    def free(self, slots: Collection[SlotId]) -> None:
        """Give slots back; see ``Tier``. Nothing happens once the tier is closed.

        Raises
        ------
        StorageError
            The file of a dead segment cannot be removed.
        """
        with self._lock:
            if self._closed:
                return  # close gave everything back
            self._forget(slots)
            freed = self._table.free(self._adopted.give_back(slots))
            for hole in freed.holes:
                offset = hole.first * self.record_bytes
                num_bytes = hole.num_records * self.record_bytes
                if self._files.punch(hole.segment, offset, num_bytes):
                    self._table.punched(hole)
            for segment in freed.dead_segments:
                self._files.unlink(segment)

    def adopt(
        self,
        path: Path,
        fingerprint: bytes,
        indexes: Sequence[int],
        sealer: Sealer | None = None,
    ) -> list[SlotId]:
        """Return slots for records of a file of somebody else, to be read until they are freed.

        Parameters
        ----------
        path : Path
            A file of records, without holes in front, of this tier's layout.
        fingerprint : bytes
            What these records carry.
        indexes : sequence of int
            Record *i* starts at byte ``i * record_bytes``.
        sealer : Sealer, optional
        """
        with self._lock:
            self._check_open()
            fmt = RecordFormat(self.layout, fingerprint, sealer)
            slots = self._adopted.adopt(
                path,
                indexes,
                self._table.reserve_number,
                lambda: RecordIo(self._files, fmt, *self._calls, self._headers, None, self.meter),
            )
            self._written.update(slots)
            return slots

    def is_own(self, slot: SlotId) -> bool:
        """Whether freeing a slot makes room, which that of an adopted record does not."""
        return locate(slot)[0] not in self._adopted

    def place_of(self, slot: SlotId) -> tuple[Path, int, int]:
        """Return the file of a slot, and the offset and number of its record's bytes there."""
        segment, index = locate(slot)
        return self._files.path(segment), index * self.record_bytes, self.record_bytes

    def take_suspects(self) -> list[tuple[Path, int]]:
        """Return the file and index of adopted records in reads that met corruption, once.

        A read joins neighbours, and the ones beside the damaged record are named as well.
        """
        return self._adopted.take_suspects()

    def read(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], out: Sequence[Tensor]
    ) -> Transfer:
        """Read and verify whole records; see ``Tier``."""
        check_buffers(slots, infos, out, self.slot_bytes)
        places = [locate(slot) for slot in slots]
        jobs: list[Job] = [
            self._read_job(
                [places[member] for member in op.members],
                partial(_read_records, op, infos, out),
            )
            for op in self._io.plan(places, self._engine.num_threads)
        ]
        return self._start_read("read", slots, infos, self.slot_bytes, jobs)

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
        """Copy parts of slots into buffers, reading little else but the headers.

        A part is a run of tokens of one KV head: a page where rows allow it, else the head. They
        are counted from the first token of the first head on, ``parts_per_head`` of each.

        Parameters
        ----------
        slots, infos : sequences of equal length
        parts : slice or sequence of int
            Consecutive parts, the same of every slot; or the first one of each slot.
        out : sequence of Tensor, uint8, or Buffers
            Of as many ``part_bytes`` as there are parts. Bypasses the page cache if page-aligned
            and a part is a whole number of pages.
        num_parts : int
            Of each slot, where ``parts`` are the first ones.
        urgent : bool
            Read before everything that is not.

        Returns
        -------
        Transfer
            Fails as that of ``read`` does. Only what was read is verified, and of each record the
            header once. Of records that are encoded, or were written with coarser checksums, more
            is read than asked for.

        Raises
        ------
        ConfigError
            ``parts`` names none, or one that there is not; or a buffer does not fit.
        """
        total = self.layout.num_kv_heads * self.parts_per_head
        firsts, count = first_parts(parts, num_parts, len(slots), total)
        num_bytes = count * self.part_bytes
        check_buffers(slots, infos, out, num_bytes)
        wanted = Parts.of(slots, infos, firsts, Buffers.of(out))
        jobs: list[Job] = [
            self._read_job(job.places(), partial(read_parts, job))
            for job in plan_parts(wanted, self._engine.num_threads, self._min_parts)
        ]
        return self._start_read("read of parts", slots, infos, num_bytes, jobs, urgent=urgent)

    def write(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], src: Sequence[Tensor]
    ) -> Transfer:
        """Write whole records; see ``Tier``. A slot cannot be read until this is done."""
        check_buffers(slots, infos, src, self.slot_bytes)
        with self._lock:
            self._check_open()
            for slot in slots:
                if not self._table.holds(slot):
                    raise ConfigError(f"disk tier: slot {slot} is not allocated")
            self._forget(slots)
        places = [locate(slot) for slot in slots]
        jobs: list[Job] = [
            partial(self._write_and_publish, op, slots, infos, src)
            for op in self._io.plan(places, self._engine.num_threads)
        ]
        return self._start(
            describe(self.name, "write", infos), len(slots) * self.slot_bytes, jobs, urgent=False
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if the invariant does not hold."""
        with self._lock:
            self._table.check_integrity()
            assert all(self._table.holds(slot) for slot in self._written if self.is_own(slot))
            assert self.used_bytes <= self.capacity_bytes

    def close(self) -> None:
        """Finish what is in flight, then remove every file of the tier. Idempotent.

        Raises
        ------
        TransferTimeout
            A transfer did not end within ``deadline_s``. The files are gone all the same.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._engine.close()
        finally:
            for segment in self._table.segments:
                self._files.unlink(segment)
            self._table = SegmentTable(0, self._table.records_per_segment)
            self._written.clear()

    def _forget(self, slots: Collection[SlotId]) -> None:
        self._written.difference_update(slots)
        for slot in slots:
            self._headers.pop(locate(slot), None)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the disk tier is closed")

    def _read_job(
        self, places: Sequence[Place], read: Callable[[RecordIo, memoryview], None]
    ) -> Job:
        """Return a job that reads with the ``RecordIo`` of the places' segment."""
        if places[0][0] in self._adopted:
            return self._adopted.job(places, read)
        return partial(read, self._io)

    def _write_and_publish(
        self,
        op: Operation,
        slots: Sequence[SlotId],
        infos: Sequence[ChunkInfo],
        src: Sequence[Tensor],
        scratch: memoryview,
    ) -> None:
        self._io.write(op, infos, src, scratch)
        with self._lock:
            if not self._closed:
                self._written.update(slots[member] for member in op.members)

    def _start_read(
        self,
        verb: str,
        slots: Sequence[SlotId],
        infos: Sequence[ChunkInfo],
        bytes_each: int,
        jobs: list[Job],
        *,
        urgent: bool = True,
    ) -> Transfer:
        """Start a read, or hand out a failed one if a slot holds no record."""
        what, num_bytes = describe(self.name, verb, infos), len(slots) * bytes_each
        with self._lock:
            self._check_open()
            has_all = self._written.issuperset(slots)
            missing = [] if has_all else [slot for slot in slots if slot not in self._written]
        if not missing:
            timed: list[Job] = [partial(self.reading.run, job) for job in jobs]
            return self._start(what, num_bytes, timed, urgent=urgent)
        failed: Future[None] = Future()
        failed.set_exception(no_record(what, missing, len(slots)))
        return FutureTransfer(what, num_bytes, [failed])

    def _start(self, what: str, num_bytes: int, jobs: list[Job], *, urgent: bool) -> Transfer:
        futures = self._engine.submit(jobs, urgent=urgent, what=what)
        return FutureTransfer(what, num_bytes, futures, withdraw=self._engine.withdraw)


def _read_records(
    op: Operation,
    infos: Sequence[ChunkInfo],
    out: Sequence[Tensor],
    io: RecordIo,
    scratch: memoryview,
) -> None:
    io.read(op, infos, out, scratch)
