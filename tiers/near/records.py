"""The records of one worker: the chunks of its KV heads, and groups of tokens out of them."""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from offload.errors import CorruptChunk
from offload.tiers.aio import thread_queue
from offload.tiers.io_engine import IoEngine
from offload.tiers.io_plan import Operation
from offload.tiers.near.extents import Extents
from offload.tiers.near.scratch_memory import thread_memory
from offload.tiers.read_meter import ReadMeter
from offload.tiers.record import RecordFormat
from offload.tiers.record_header import check_header
from offload.tiers.record_io import KnownHeaders, RecordIo
from offload.tiers.segment import Hole, locate
from offload.tiers.segment_files import SegmentFiles
from offload.tiers.syscalls import VectoredCall, read_fully
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout, SlotId

Ints = NDArray[np.int64]


class ShardRecords:
    """Records in segment files, named by slots that somebody else allocates.

    Any thread may call any method; calls return when the work is done.

    Parameters
    ----------
    directory : Path
    token : str
        Begins the names of the files; with the same one they are found again.
    layout : ChunkLayout
        Of the worker's heads.
    fingerprint : bytes
    num_threads : int
        That read and write.
    deadline_s : float
    preadv, pwritev : callable
        The system calls.

    Attributes
    ----------
    group_tokens : int
        Tokens of the smallest group that is verified by itself; groups are multiples of it.
    """

    def __init__(
        self,
        directory: Path,
        token: str,
        layout: ChunkLayout,
        *,
        fingerprint: bytes = b"",
        num_threads: int = 4,
        deadline_s: float = 60.0,
        preadv: VectoredCall = os.preadv,
        pwritev: VectoredCall = os.pwritev,
    ) -> None:
        self.layout = layout
        self.fmt = RecordFormat(layout, fingerprint)
        self.group_tokens = self.fmt.unit_tokens
        self.meter = ReadMeter()
        self._files = SegmentFiles(directory, token)
        self._headers: KnownHeaders = {}
        self._infos: dict[SlotId, ChunkInfo] = {}
        self._checksums_of: dict[SlotId, NDArray[np.uint64]] = {}
        self._io = RecordIo(
            self._files,
            self.fmt,
            preadv,
            pwritev,
            self._headers,
            None,
            self.meter,
            keeps_written=True,
        )
        self._engine = IoEngine(num_threads, deadline_s=deadline_s)
        self._deadline_s = deadline_s
        self._lock = threading.Lock()

    def __contains__(self, slot: SlotId) -> bool:
        return slot in self._infos

    def adopt(self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo]) -> None:
        """Take note of records that an earlier process wrote; reading verifies them."""
        self._infos |= zip(slots, infos, strict=True)

    def write(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], src: Sequence[Tensor]
    ) -> None:
        """Write whole records; ``src`` are ``uint8 [slot_bytes]``.

        Raises
        ------
        DiskFull, StorageError
        """
        for slot in slots:
            self._checksums_of.pop(slot, None)
        self._run(slots, lambda op, scratch: self._io.write(op, infos, src, scratch), urgent=False)
        self.adopt(slots, infos)

    def read(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo] | None, out: Sequence[Tensor]
    ) -> None:
        """Read and verify whole records.

        Raises
        ------
        CorruptChunk, StorageError
        """
        known = [self.info(slot) for slot in slots] if infos is None else infos
        self._run(slots, lambda op, scratch: self._io.read(op, known, out, scratch), urgent=True)

    def info(self, slot: SlotId) -> ChunkInfo:
        """Return what the record of a slot has to be about.

        Raises
        ------
        CorruptChunk
            It holds none.
        """
        info = self._infos.get(slot)
        if info is None:
            raise CorruptChunk(f"slot {slot} holds no record (never written, failed or freed)")
        return info

    def read_pages(self, extents: Extents, memory: Tensor) -> None:
        """Read pages of segments into memory, all at once; nothing is verified.

        Parameters
        ----------
        extents : Extents
            Of segments, by their numbers.
        memory : Tensor, uint8

        Raises
        ------
        StorageError
        """
        direct = self._io.is_direct
        numbers = np.unique(extents.file)
        addresses = extents.places + memory.data_ptr()
        with ExitStack() as opened:
            fds = [
                opened.enter_context(self._files.open(number, writing=False, direct=direct))
                for number in numbers.tolist()
            ]
            each = np.array(fds, np.int64)[np.searchsorted(numbers, extents.file)]
            queue = thread_queue() if direct and self._io.preadv is os.preadv else None
            if queue is None or not queue.read(each, extents.offsets, addresses, extents.num_bytes):
                view = memory.numpy().data
                for fd, (segment, offset, length, at) in zip(
                    each.tolist(), np.stack(extents, 1).tolist(), strict=True
                ):
                    file = str(self._files.path(segment))
                    read_fully(fd, [view[at : at + length]], offset, file, self._io.preadv)
        self.meter.add(int(extents.num_bytes.sum()), len(extents.offsets))

    def checksums(self, slot: SlotId) -> NDArray[np.uint64]:
        """Return those of the units of a record; its header is read if it is not known.

        Raises
        ------
        CorruptChunk, StorageError
        """
        known = self._checksums_of.get(slot)
        if known is not None:
            return known
        info, place = self.info(slot), locate(slot)
        stored = self._io.known(place, info)
        if stored is None:
            page = thread_memory("header", PAGE_BYTES)[:PAGE_BYTES]

            def move(fd: int, file: str) -> None:
                read_fully(fd, [page.numpy().data], self._io.start_of(place), file, self._io.preadv)

            self._io.on_file(place[0], move, writing=False, is_aligned=True)
            stored = check_header(page.numpy().data, self.fmt, info)
            self._headers[place] = stored
        found = self._checksums_of[slot] = np.frombuffer(stored.checksums, np.uint64)
        return found

    def forget(
        self, slots: Sequence[SlotId], holes: Sequence[Hole], dead_segments: Sequence[int]
    ) -> list[bool]:
        """Drop records, and give their space back.

        Returns
        -------
        list of bool
            For each hole, whether the file system took it back.
        """
        for slot in slots:
            self._infos.pop(slot, None)
            self._checksums_of.pop(slot, None)
            self._headers.pop(locate(slot), None)
        size = self.fmt.record_bytes
        for segment in dead_segments:
            self._files.unlink(segment)
        return [
            self._files.punch(hole.segment, hole.first * size, hole.num_records * size)
            for hole in holes
        ]

    def close(self, segments: Iterable[int] = ()) -> None:
        """Stop the threads and remove the files of segments. Idempotent."""
        try:
            self._engine.close()
        finally:
            for segment in segments:
                self._files.unlink(segment)

    def _run(
        self,
        slots: Sequence[SlotId],
        move: Callable[[Operation, memoryview], None],
        *,
        urgent: bool,
    ) -> None:
        ops = self._io.plan([locate(slot) for slot in slots], self._engine.num_threads)
        futures = self._engine.submit([partial(move, op) for op in ops], urgent=urgent)
        failed = [error for future in futures if (error := future.exception()) is not None]
        if failed:
            raise failed[0]
