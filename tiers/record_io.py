"""Move records between buffers and segment files. Runs on the threads of the I/O engine."""

import errno
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from torch import Tensor

from offload.errors import StorageError
from offload.tiers.codecs import Codec
from offload.tiers.io_plan import Extent, Operation, join_pieces, plan_io
from offload.tiers.pool import page_aligned
from offload.tiers.read_meter import ReadMeter
from offload.tiers.record import RecordFormat, Stored, raw_record
from offload.tiers.record_codec import decode_record, encode_record
from offload.tiers.record_header import pack_header, verify
from offload.tiers.record_seal import open_units, raw_units, seal_record
from offload.tiers.segment_files import SegmentFiles
from offload.tiers.syscalls import VectoredCall, read_fully, supports_direct_io, write_fully
from offload.types import PAGE_BYTES, ChunkInfo, round_up

_BUFFERS_PER_RECORD = 2

_NO_SPILL = memoryview(b"")

Place = tuple[int, int]
"""Segment, and index of the record in it."""

KnownHeaders = dict[Place, Stored]
"""What verified headers said."""

ChooseCodec = Callable[[ChunkInfo], Codec | None]
"""Says how a chunk is stored; None is raw. Called on any thread of the I/O engine."""


class RecordIo:
    """Reads and writes records, verifying each one that is read.

    Raw payloads go straight between the disk and the caller's buffers; only the header pages pass
    through the scratch memory of the thread. Encoded ones are shorter, and leave the rest of their
    place in the file unwritten. Any thread may call any method.

    Parameters
    ----------
    files : SegmentFiles
    fmt : RecordFormat
    preadv, pwritev : callable
        The system calls.
    headers : dict, optional
        What verified headers said, so that they need not be read again. The caller takes out what
        is overwritten or gone. By default all are read.
    meter : ReadMeter, optional
        Counts what is read.
    choose : callable, optional
        How each chunk is stored; needs ``headers``, which say how long encoded records are. By
        default raw.
    keeps_written : bool
        Whether ``headers`` are to know raw records, too, from when they are written.

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
        choose: ChooseCodec | None = None,
        meter: ReadMeter | None = None,
        *,
        keeps_written: bool = False,
    ) -> None:
        assert (choose is None and not keeps_written) or headers is not None
        self.fmt = fmt
        self.is_direct = supports_direct_io(files.directory)
        self.preadv = preadv
        self.headers = headers
        self.meter = ReadMeter() if meter is None else meter
        self._files = files
        self._pwritev = pwritev
        self._choose = choose
        self._keeps_written = keeps_written
        self._rooms = threading.local()

    def plan(self, places: Sequence[Place], num_threads: int) -> list[Operation]:
        """Join records into operations."""
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
        headers = pages(scratch, len(op.members))
        payloads = [view(out[member]) for member in op.members]
        pieces: list[tuple[int, memoryview]] = []
        for member, place, header, payload in zip(
            op.members, self._places(op), headers, payloads, strict=True
        ):
            start, known = self.start_of(place), self.known(place, infos[member])
            length = len(payload) if known is None else round_up(known.payload_bytes)
            pieces += [(start, header), (start + PAGE_BYTES, payload[:length])]
        reads = join_pieces(pieces, _NO_SPILL)

        def move(fd: int, file: str) -> None:
            for offset, buffers in reads:
                read_fully(fd, buffers, offset, file, self.preadv)

        aligned = are_aligned(out[member] for member in op.members)
        self.on_file(op.segment, move, writing=False, is_aligned=aligned)
        self.meter.add(sum(len(piece) for _, piece in pieces), len(reads))
        for member, place, header, payload in zip(
            op.members, self._places(op), headers, payloads, strict=True
        ):
            stored = verify(header, payload, self.fmt, infos[member])
            if stored.seal:
                units = [payload[start:end] for start, end in pairwise(stored.starts)]
                open_units(self.fmt, stored, units, 0, self.where(place))
            if stored.codec:
                decode_record(self.fmt, stored, payload, out[member], self.meter)

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
        headers = pages(scratch, len(op.members))
        pieces: list[tuple[int, memoryview]] = []
        learnt: KnownHeaders = {}
        for number, (member, place) in enumerate(zip(op.members, self._places(op), strict=True)):
            header = headers[number]
            stored, payload = self._encode(infos[member], src[member], place, number)
            header[:] = pack_header(self.fmt, stored)
            start = self.start_of(place)
            pieces += [(start, header), (start + PAGE_BYTES, payload)]
            if stored.codec or stored.seal or self._keeps_written:
                learnt[place] = stored
        writes = join_pieces(pieces, _NO_SPILL)

        def move(fd: int, file: str) -> None:
            for offset, buffers in writes:
                write_fully(fd, buffers, offset, file, self._pwritev)

        aligned = are_aligned(src[member] for member in op.members)
        self.on_file(op.segment, move, writing=True, is_aligned=aligned)
        if self.headers is not None:
            self.headers |= learnt

    def start_of(self, place: Place) -> int:
        """Return the offset of a record's header in its file."""
        return place[1] * self.fmt.record_bytes

    def known(self, place: Place, info: ChunkInfo) -> Stored | None:
        """Return what the header of a record said, if it was read and was that of this chunk."""
        stored = None if self.headers is None else self.headers.get(place)
        return None if stored is None or stored.info != info else stored

    def where(self, place: Place) -> bytes:
        """Return what a sealed record is bound to: its file, published or not, and its index."""
        name = self._files.path(place[0]).name.partition(".")[0]
        return f"record {place[1]} of {name}".encode()

    def on_file(
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

    def _places(self, op: Operation) -> list[Place]:
        first = op.offset // self.fmt.record_bytes
        return [(op.segment, first + number) for number in range(len(op.members))]

    def _encode(
        self, info: ChunkInfo, source: Tensor, place: Place, number: int
    ) -> tuple[Stored, memoryview]:
        """Return what the header is to say, and the payload in whole pages.

        That of a sealed record is good until this thread writes another with its number.
        """
        codec = None if self._choose is None else self._choose(info)
        coded = None if codec is None else encode_record(self.fmt, info, source, codec)
        payload = view(source)
        if self.fmt.sealer is not None:
            stored, units = coded or (raw_units(self.fmt, info), payload)
            return seal_record(self.fmt, stored, units, self.where(place), self._room(number))
        if coded is not None:
            return coded
        return raw_record(self.fmt, info, payload[: self.fmt.payload_bytes]), payload

    def _room(self, number: int) -> memoryview:
        """Return memory of this thread for a sealed slot.

        It is kept, ``MAX_OP_BYTES`` at most: to fault in new pages takes longer than to seal them.
        """
        rooms: list[memoryview] = self._rooms.__dict__.setdefault("rooms", [])
        while len(rooms) <= number:
            rooms.append(view(page_aligned(self.fmt.layout.slot_bytes)))
        return rooms[number]


def pages(memory: memoryview, n: int) -> list[memoryview]:
    """Return the first ``n`` pages of memory."""
    return [memory[start : start + PAGE_BYTES] for start in range(0, n * PAGE_BYTES, PAGE_BYTES)]


def view(buffer: Tensor) -> memoryview:
    """Return a buffer's bytes."""
    return buffer.numpy().data


def are_aligned(buffers: Iterable[Tensor]) -> bool:
    """Whether all buffers begin on pages."""
    return all(buffer.data_ptr() % PAGE_BYTES == 0 for buffer in buffers)
