"""Read the records of an open session one after the other, as an archive has them."""

from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial

from torch import Tensor

from offload.errors import CorruptChunk
from offload.sessions.archive_format import distinct_blocks
from offload.sessions.checking import Expected, RecordChecker
from offload.sessions.keys import record_id
from offload.sessions.opening import Held
from offload.sessions.quarantine import quarantine_records
from offload.sessions.root import Root
from offload.sessions.session_file import SessionFile
from offload.tiers.io_engine import IoEngine, Job
from offload.tiers.pool import page_aligned
from offload.tiers.record_io import RecordIo
from offload.tiers.segment_files import SegmentFiles
from offload.tiers.transfer import FutureTransfer, Transfer
from offload.types import ChunkInfo

_BURST_BYTES = 8 << 20
_THREADS = 4


class RecordSource:
    """The records of a session whose chunks are held in place.

    Parameters
    ----------
    root : Root
    file : SessionFile
    held : Held
        Of this session; to be released by whoever has it, after the last record was read.

    Attributes
    ----------
    fmt : RecordFormat
    num_blocks : int
    num_records : int
    """

    def __init__(self, root: Root, file: SessionFile, held: Held) -> None:
        self.fmt = root.format_of(file.layout, held.fingerprint)
        self._root = root
        self._file = file
        self._held = held
        self._blocks = list(distinct_blocks(file).items())
        self.num_blocks = len(self._blocks)
        self.num_records = self.num_blocks * len(file.layers)
        self._segments = {name: number for number, name in enumerate(held.shapes)}

    def records(self) -> Generator[tuple[ChunkInfo, Tensor], None, None]:
        """Yield every record, reading the next ones while the caller has these.

        Yields
        ------
        info : ChunkInfo
        payload : Tensor, uint8 [chunk_bytes]
            Verified; valid until the next record is asked for.

        Raises
        ------
        CorruptChunk
            A record is not what was written. It is in quarantine now.
        StorageError, TransferTimeout
        """
        if not self.num_records:
            return
        slot_bytes, chunk_bytes = self.fmt.layout.slot_bytes, self.fmt.layout.chunk_bytes
        size = max(1, min(self.num_records, _BURST_BYTES // slot_bytes))
        buffers = page_aligned(2 * size * slot_bytes).view(2, size, slot_bytes)
        bursts = [
            range(start, min(start + size, self.num_records))
            for start in range(0, self.num_records, size)
        ]
        with closing(IoEngine(_THREADS, deadline_s=self._root.deadline_s)) as engine:
            io = RecordIo(self._adopted_files(), self.fmt)
            started = self._start(io, engine, bursts[0], buffers[0])
            for turn, burst in enumerate(bursts):
                self._finish(started, burst, engine)
                if turn + 1 < len(bursts):
                    started = self._start(io, engine, bursts[turn + 1], buffers[(turn + 1) % 2])
                for number, buffer in zip(burst, buffers[turn % 2], strict=False):
                    yield self._info(number), buffer[:chunk_bytes]

    def _adopted_files(self) -> SegmentFiles:
        paths = {name: self._root.paths.segment(name) for name in self._segments}
        files = SegmentFiles(next(iter(paths.values())).parent)
        for name, path in paths.items():
            files.adopt(self._segments[name], path)
        return files

    def _start(
        self, io: RecordIo, engine: IoEngine, burst: Sequence[int], buffers: Tensor
    ) -> Transfer:
        infos, out = [self._info(number) for number in burst], list(buffers[: len(burst)])
        places = [self._place(number) for number in burst]
        ops = io.plan([(self._segments[name], i) for name, i in places], engine.num_threads)
        jobs: list[Job] = [partial(io.read, op, infos, out) for op in ops]
        what = f"read of {len(burst)} records of session {self._file.name!r}"
        num_bytes = len(burst) * self.fmt.layout.slot_bytes
        return FutureTransfer(what, num_bytes, engine.submit(jobs, urgent=True))

    def _finish(self, started: Transfer, burst: Sequence[int], engine: IoEngine) -> None:
        try:
            started.wait(self._root.deadline_s)
        except CorruptChunk:
            self._quarantine(burst, engine)
            raise

    def _quarantine(self, burst: Sequence[int], engine: IoEngine) -> None:
        """Find out which records of a burst are bad, and set them aside."""
        suspects: dict[str, list[Expected]] = {}
        for number in burst:
            name, index = self._place(number)
            suspects.setdefault(name, []).append((index, self._info(number)))
        for name, expected in suspects.items():
            path = self._root.paths.segment(name)
            checker = RecordChecker(path, self.fmt, engine, self._root.deadline_s)
            bad = list(checker.check(sorted(expected), lambda count: None))
            quarantine_records(self._root.catalog, self._root.paths, bad)

    def _info(self, number: int) -> ChunkInfo:
        layer, block = divmod(number, self.num_blocks)
        ref, position = self._blocks[block]
        first_token = position * self.fmt.layout.chunk_tokens
        return ChunkInfo(record_id(ref.key), self._file.layers[layer], first_token)

    def _place(self, number: int) -> tuple[str, int]:
        layer, block = divmod(number, self.num_blocks)
        ref = self._blocks[block][0]
        return ref.segment, layer * self._held.shapes[ref.segment][1] + ref.position
