"""Read records back and compare them with what they should be."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from errno import EIO, ENOENT
from functools import partial
from pathlib import Path

from torch import Tensor

from offload.errors import CorruptCatalog, CorruptChunk, StorageError
from offload.sessions.keys import record_id
from offload.sessions.session_file import BlockRef
from offload.tiers.io_engine import IoEngine
from offload.tiers.io_plan import Operation
from offload.tiers.pool import page_aligned
from offload.tiers.record import RecordFormat
from offload.tiers.record_io import RecordIo
from offload.tiers.segment_files import SegmentFiles
from offload.tiers.transfer import FutureTransfer
from offload.types import ChunkInfo

_BURST_BYTES = 16 << 20
_SEGMENT = 0

Expected = tuple[int, ChunkInfo]
"""Index of a record in its file, and what must be found there."""

Records = dict[int, ChunkInfo]
"""The same, of one file."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that is not what was written.

    Attributes
    ----------
    path : Path
    index : int
    reason : str
    was_known : bool
        It was in quarantine before.
    """

    path: Path
    index: int
    reason: str
    was_known: bool = False


def expected_records(
    rows: Iterable[Sequence[BlockRef]],
    shapes: Mapping[str, tuple[int, int]],
    layers: Sequence[int],
    chunk_tokens: int,
) -> dict[str, Records]:
    """Return what must lie at which index of which segment.

    Parameters
    ----------
    rows : iterable of sequence of BlockRef
    shapes : mapping of str to (num_layers, num_positions)
        Of the segments.
    layers : sequence of int
        Model layers, in the order of the records.
    chunk_tokens : int
    """
    expected: dict[str, Records] = {name: {} for name in shapes}
    for row in rows:
        for position, ref in enumerate(row):
            records, identity = expected[ref.segment], record_id(ref.key)
            num_positions = shapes[ref.segment][1]
            for number, layer in enumerate(layers):
                index = number * num_positions + ref.position
                records[index] = ChunkInfo(identity, layer, position * chunk_tokens)
    return expected


class RecordChecker:
    """Reads records of one file and verifies them.

    Parameters
    ----------
    path : Path
    fmt : RecordFormat
    engine : IoEngine
    deadline_s : float
        Longest wait for one read.
    """

    def __init__(self, path: Path, fmt: RecordFormat, engine: IoEngine, deadline_s: float) -> None:
        files = SegmentFiles(path.parent)
        files.adopt(_SEGMENT, path)
        self._path = path
        self._io = RecordIo(files, fmt)
        self._engine = engine
        self._deadline_s = deadline_s
        self._slot_bytes = fmt.layout.slot_bytes

    def check(
        self, expected: Iterable[Expected], progress: Callable[[int], object]
    ) -> Iterator[BadRecord]:
        """Yield the records that are bad.

        Parameters
        ----------
        expected : iterable of (index, ChunkInfo)
            In the order of the file.
        progress : callable
            Told how many more records have been read.

        Raises
        ------
        StorageError, TransferTimeout
            It cannot be told: too many open files, say.
        """
        todo = list(expected)
        burst = max(1, min(len(todo), _BURST_BYTES // self._slot_bytes))
        buffers = list(page_aligned(burst * self._slot_bytes).view(burst, self._slot_bytes))
        for start in range(0, len(todo), burst):
            part = todo[start : start + burst]
            for suspects in self._unreadable(part, buffers):
                for index, info in suspects:
                    try:
                        self._read([(index, info)], buffers)
                    except StorageError as error:
                        if not is_damage(error):
                            raise
                        yield BadRecord(self._path, index, str(error))
            progress(len(part))

    def _unreadable(
        self, part: Sequence[Expected], buffers: Sequence[Tensor]
    ) -> list[list[Expected]]:
        """Read neighbours together; return those reads that met something bad."""
        pending = self._start(part, buffers)
        failed = []
        for op, transfer in pending:
            try:
                transfer.wait(self._deadline_s)
            except StorageError:
                failed.append([part[member] for member in op.members])
        return failed

    def _read(self, part: Sequence[Expected], buffers: Sequence[Tensor]) -> None:
        for _, transfer in self._start(part, buffers):
            transfer.wait(self._deadline_s)

    def _start(
        self, part: Sequence[Expected], buffers: Sequence[Tensor]
    ) -> list[tuple[Operation, FutureTransfer]]:
        infos, out = [info for _, info in part], list(buffers[: len(part)])
        ops = self._io.plan([(_SEGMENT, index) for index, _ in part], self._engine.num_threads)
        futures = self._engine.submit(
            [partial(self._io.read, op, infos, out) for op in ops], urgent=True
        )
        what = f"check of {self._path}"
        return [
            (op, FutureTransfer(what, op.num_bytes, [future]))
            for op, future in zip(ops, futures, strict=True)
        ]


def is_damage(error: StorageError) -> bool:
    """Whether an error says something about a record or file, and not about this process."""
    return isinstance(error, CorruptChunk | CorruptCatalog) or error.errno in (EIO, ENOENT)
