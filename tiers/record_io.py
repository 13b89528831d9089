"""Move records between buffers and segment files. Runs on the threads of the I/O engine."""

import errno
import os
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from offload.errors import ConfigError, StorageError
from offload.tiers.io_plan import (
    MAX_OP_BUFFERS,
    MAX_OP_BYTES,
    Extent,
    Operation,
    join_pieces,
    plan_io,
    share_out,
)
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

_SPILL_BYTES = 8 * PAGE_BYTES
"""A gap of so many bytes is read as fast as it is skipped by another system call, for less CPU."""

_MAX_SHARE = MAX_OP_BUFFERS // (2 * _BUFFERS_PER_RECORD)
"""Records whose pieces, and the gaps between them, fit into one system call."""


KnownHeaders = dict[tuple[int, int], tuple[ChunkInfo, tuple[int, ...]]]
"""By segment and index of a record: what it holds, and the checksums of its heads."""


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
    headers : dict, optional
        By (segment, index): what verified headers said, so that ``read_heads`` need not read them
        again. The caller takes out what is overwritten or gone. By default all are read.

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
        headers: KnownHeaders | None = None,
    ) -> None:
        self.fmt = fmt
        self.is_direct = supports_direct_io(files.directory)
        self._files = files
        self._preadv = preadv
        self._pwritev = pwritev
        self._headers = headers

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

        def move(fd: int, file: str) -> None:
            read_fully(fd, buffers, op.offset, file, self._preadv)

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

        def move(fd: int, file: str) -> None:
            write_fully(fd, buffers, op.offset, file, self._pwritev)

        self._on_file(op.segment, move, writing=True, is_aligned=is_aligned)

    def plan_heads(
        self, places: Sequence[tuple[int, int]], num_bytes: int, num_threads: int
    ) -> list[list[int]]:
        """Divide records, of which ``num_bytes`` of heads are to be read, into jobs."""
        most = max(1, min(_MAX_SHARE, MAX_OP_BYTES // (PAGE_BYTES + num_bytes)))
        return share_out(places, num_threads, most)

    def read_heads(
        self,
        places: Sequence[tuple[int, int]],
        members: Sequence[int],
        infos: Sequence[ChunkInfo],
        firsts: Sequence[int],
        out: Sequence[Tensor],
        scratch: memoryview,
    ) -> None:
        """Fill buffers with consecutive KV heads of some records, verifying these only.

        Parameters
        ----------
        places : sequence of (segment, index)
        members : sequence of int
            Indexes into ``places``, ``infos``, ``firsts`` and ``out``, from ``plan_heads``.
        infos : sequence of ChunkInfo
        firsts : sequence of int
            The first head of each record.
        out : sequence of Tensor, uint8
            A whole number of heads each.
        scratch : memoryview
            A page for each record, and ``_SPILL_BYTES``.

        Raises
        ------
        CorruptChunk
        StorageError
        """
        segment = places[members[0]][0]
        spill, headers = scratch[:_SPILL_BYTES], _pages(scratch[_SPILL_BYTES:], len(members))
        payloads = [_view(out[member]) for member in members]
        known = [self._known_digests(places[member], infos[member]) for member in members]
        pieces: list[tuple[int, memoryview]] = []
        for member, header, payload, digests in zip(members, headers, payloads, known, strict=True):
            start = places[member][1] * self.fmt.record_bytes
            if digests is None:
                pieces.append((start, header))
            pieces.append((start + PAGE_BYTES + firsts[member] * self.fmt.head_bytes, payload))
        reads = join_pieces(pieces, spill)

        def move(fd: int, file: str) -> None:
            for offset, buffers in reads:
                read_fully(fd, buffers, offset, file, self._preadv)

        whole_pages = self.fmt.head_bytes % PAGE_BYTES == 0
        is_aligned = whole_pages and _are_aligned(out[member] for member in members)
        self._on_file(segment, move, writing=False, is_aligned=is_aligned)
        for member, header, payload, digests in zip(members, headers, payloads, known, strict=True):
            info = infos[member]
            if digests is None:
                digests = check_header(header, self.fmt, info)
                if self._headers is not None:
                    self._headers[places[member]] = info, digests
            check_heads(payload, self.fmt, info, digests, firsts[member])

    def _known_digests(self, place: tuple[int, int], info: ChunkInfo) -> tuple[int, ...] | None:
        known = None if self._headers is None else self._headers.get(place)
        return None if known is None or known[0] != info else known[1]

    def _on_file(
        self, segment: int, move: Callable[[int, str], None], *, writing: bool, is_aligned: bool
    ) -> None:
        """Open a segment and move bytes, through the page cache if need be.

        With ``O_DIRECT`` the system refuses to go on from inside a page, which is where a truncated
        file or a limit on the file size leaves it; without, the same call tells what is wrong.
        """
        direct, file = self.is_direct and is_aligned, str(self._files.path(segment))
        try:
            with self._files.open(segment, writing=writing, direct=direct) as fd:
                move(fd, file)
        except StorageError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            with self._files.open(segment, writing=writing, direct=False) as fd:
                move(fd, file)


def first_heads(
    heads: slice | Sequence[int], num_slots: int, num_kv_heads: int
) -> tuple[Sequence[int], int]:
    """Return the first head to read of each slot, and how many from there.

    Parameters
    ----------
    heads : slice or sequence of int
        Consecutive heads, the same of every slot; or one of each slot.
    num_slots, num_kv_heads : int

    Raises
    ------
    ConfigError
        They are none, not consecutive, not as many as slots, or there are no such heads.
    """
    if isinstance(heads, slice):
        first, stop, step = heads.indices(num_kv_heads)
        if step != 1 or stop <= first:
            raise ConfigError(f"{heads} does not name consecutive heads of {num_kv_heads}")
        return [first] * num_slots, stop - first
    if len(heads) != num_slots or not all(0 <= head < num_kv_heads for head in heads):
        raise ConfigError(
            f"{heads} does not name one of {num_kv_heads} heads for {num_slots} slots"
        )
    return heads, 1


def _pages(memory: memoryview, n: int) -> list[memoryview]:
    return [memory[start : start + PAGE_BYTES] for start in range(0, n * PAGE_BYTES, PAGE_BYTES)]


def _view(buffer: Tensor) -> memoryview:
    return buffer.numpy().data


def _are_aligned(buffers: Iterable[Tensor]) -> bool:
    return all(buffer.data_ptr() % PAGE_BYTES == 0 for buffer in buffers)


def _scatter(
    op: Operation, tensors: Sequence[Tensor], scratch: memoryview
) -> tuple[list[memoryview], list[memoryview], list[memoryview]]:
    """Return the header pages, the payloads, and both in turn, as they lie on disk."""
    headers = _pages(scratch, len(op.members))
    payloads = [_view(tensors[member]) for member in op.members]
    both = [view for pair in zip(headers, payloads, strict=True) for view in pair]
    return headers, payloads, both
