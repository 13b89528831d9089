"""Move records between buffers and segment files. Runs on the threads of the I/O engine."""

import errno
import os
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from offload.errors import StorageError
from offload.tiers.io_plan import Extent, Operation, plan_io
from offload.tiers.record import (
    RecordFormat,
    check_header,
    check_heads,
    digest_heads,
    pack_header,
    verify,
)
from offload.tiers.segment_files import SegmentFiles
from offload.tiers.syscalls import VectoredCall, read_fully, supports_direct_io, write_fully
from offload.types import PAGE_BYTES, ChunkInfo

_BUFFERS_PER_RECORD = 2


class RecordIo:
    """Reads and writes records, verifying each one that is read.

    Payloads go straight between the disk and the caller's buffers; only the header pages pass
    through the scratch memory of the thread. Any thread may call any method.

    Parameters
    ----------
    files : SegmentFiles
    fmt : RecordFormat
    preadv, pwritev : callable
        The system calls.

    Raises
    ------
    ConfigError
        The directory of the files cannot be written.
    """

    def __init__(
        self,
        files: SegmentFiles,
        fmt: RecordFormat,
        preadv: VectoredCall = os.preadv,
        pwritev: VectoredCall = os.pwritev,
    ) -> None:
        self.fmt = fmt
        self.is_direct = supports_direct_io(files.directory)
        self._files = files
        self._preadv = preadv
        self._pwritev = pwritev

    def plan(self, places: Sequence[tuple[int, int]], num_threads: int) -> list[Operation]:
        """Join records, each given as (segment, index), into operations."""
        size = self.fmt.record_bytes
        extents = [
            Extent(segment, index * size, size, _BUFFERS_PER_RECORD) for segment, index in places
        ]
        return plan_io(extents, num_threads)

    def read(
        self,
        op: Operation,
        infos: Sequence[ChunkInfo],
        out: Sequence[Tensor],
        scratch: memoryview,
    ) -> None:
        """Fill buffers with the payloads of neighbouring records.

        Parameters
        ----------
        op : Operation
            Its members index ``infos`` and ``out``.
        infos : sequence of ChunkInfo
        out : sequence of Tensor, uint8 [slot_bytes]
        scratch : memoryview
            A page for each record.

        Raises
        ------
        CorruptChunk
            A record is not what was written, or the file ends too early.
        StorageError
        """
        headers, payloads, buffers = _scatter(op, out, scratch)
        is_aligned = _are_aligned(out[member] for member in op.members)
        what = self._describe("read", op.segment, op.offset, op.num_bytes)

        def move(fd: int) -> None:
            read_fully(fd, buffers, op.offset, what, self._preadv)

        self._on_file(op.segment, move, writing=False, is_aligned=is_aligned)
        for member, header, payload in zip(op.members, headers, payloads, strict=True):
            verify(header, payload, self.fmt, infos[member])

    def write(
        self,
        op: Operation,
        infos: Sequence[ChunkInfo],
        src: Sequence[Tensor],
        scratch: memoryview,
    ) -> None:
        """Write buffers as neighbouring records.

        Parameters
        ----------
        op, infos, src, scratch
            As in ``read``.

        Raises
        ------
        DiskFull
        StorageError
        """
        headers, payloads, buffers = _scatter(op, src, scratch)
        is_aligned = _are_aligned(src[member] for member in op.members)
        for member, header, payload in zip(op.members, headers, payloads, strict=True):
            chunk = payload[: self.fmt.payload_bytes]
            digests = digest_heads(chunk, self.fmt.head_bytes)
            header[:] = pack_header(self.fmt, infos[member], digests)
        what = self._describe("write", op.segment, op.offset, op.num_bytes)

        def move(fd: int) -> None:
            write_fully(fd, buffers, op.offset, what, self._pwritev)

        self._on_file(op.segment, move, writing=True, is_aligned=is_aligned)

    def read_heads(
        self,
        place: tuple[int, int],
        info: ChunkInfo,
        first: int,
        out: Tensor,
        scratch: memoryview,
    ) -> None:
        """Fill a buffer with consecutive KV heads of one record, verifying these only.

        Parameters
        ----------
        place : tuple of int
            Segment and index.
        info : ChunkInfo
        first : int
            The first head.
        out : Tensor, uint8
            A whole number of heads.
        scratch : memoryview
            A page.

        Raises
        ------
        CorruptChunk
        StorageError
        """
        segment, index = place
        header, payload = scratch[:PAGE_BYTES], _view(out)
        start = index * self.fmt.record_bytes
        offset = start + PAGE_BYTES + first * self.fmt.head_bytes
        is_aligned = _are_aligned([out]) and self.fmt.head_bytes % PAGE_BYTES == 0

        def move(fd: int) -> None:
            what = self._describe("read", segment, start, PAGE_BYTES)
            read_fully(fd, [header], start, what, self._preadv)
            what = self._describe("read", segment, offset, len(payload))
            read_fully(fd, [payload], offset, what, self._preadv)

        self._on_file(segment, move, writing=False, is_aligned=is_aligned)
        digests = check_header(header, self.fmt, info)
        check_heads(payload, self.fmt, info, digests, first)

    def _on_file(
        self, segment: int, move: Callable[[int], None], *, writing: bool, is_aligned: bool
    ) -> None:
        """Open a segment and move bytes, through the page cache if need be.

        With ``O_DIRECT`` the system refuses to go on from inside a page, which is where a truncated
        file or a limit on the file size leaves it; without, the same call tells what is wrong.
        """
        direct = self.is_direct and is_aligned
        try:
            with self._files.open(segment, writing=writing, direct=direct) as fd:
                move(fd)
        except StorageError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            with self._files.open(segment, writing=writing, direct=False) as fd:
                move(fd)

    def _describe(self, verb: str, segment: int, offset: int, num_bytes: int) -> str:
        return f"{verb} of {num_bytes} bytes at offset {offset} of {self._files.path(segment)}"


def _view(buffer: Tensor) -> memoryview:
    return buffer.numpy().data


def _are_aligned(buffers: Iterable[Tensor]) -> bool:
    return all(buffer.data_ptr() % PAGE_BYTES == 0 for buffer in buffers)


def _scatter(
    op: Operation, tensors: Sequence[Tensor], scratch: memoryview
) -> tuple[list[memoryview], list[memoryview], list[memoryview]]:
    """Return the header pages, the payloads, and both in turn, as they lie on disk."""
    starts = range(0, len(op.members) * PAGE_BYTES, PAGE_BYTES)
    headers = [scratch[start : start + PAGE_BYTES] for start in starts]
    payloads = [_view(tensors[member]) for member in op.members]
    both = [view for pair in zip(headers, payloads, strict=True) for view in pair]
    return headers, payloads, both
