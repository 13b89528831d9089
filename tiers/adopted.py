"""Records of somebody else's files, which a disk tier reads but never changes."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from offload.errors import CorruptChunk
from offload.tiers.io_engine import Job
from offload.tiers.record_io import Place, RecordIo
from offload.tiers.segment_files import SegmentFiles


class AdoptedFiles:
    """Which segments are files of others, and which of their records met corruption.

    Numbers are given by one thread; any thread may run jobs and take suspects.

    Parameters
    ----------
    files : SegmentFiles
    """

    def __init__(self, files: SegmentFiles) -> None:
        self._files = files
        self._numbers: dict[Path, int] = {}
        self._io: dict[int, RecordIo] = {}
        self._suspects: list[Place] = []
        self._lock = threading.Lock()

    def __contains__(self, segment: int) -> bool:
        return segment in self._io

    def number_of(
        self, path: Path, reserve: Callable[[], int], make: Callable[[], RecordIo]
    ) -> int:
        """Return the segment number of a file, adopting it the first time.

        Parameters
        ----------
        path : Path
        reserve : callable
            Returns a number for a file that is new.
        make : callable
            Returns what reads its records.
        """
        number = self._numbers.get(path)
        if number is None:
            number = self._numbers[path] = reserve()
            self._io[number] = make()
            self._files.adopt(number, path)
        return number

    def job(self, places: Sequence[Place], read: Callable[[RecordIo, memoryview], None]) -> Job:
        """Return a job that reads records of one adopted segment, and notes corruption."""
        return partial(self._run, self._io[places[0][0]], places, read)

    def take_suspects(self) -> list[tuple[Path, int]]:
        """Return the file and index of records in reads that met corruption, once."""
        with self._lock:
            suspects, self._suspects = self._suspects, []
        return [(self._files.path(segment), index) for segment, index in suspects]

    def _run(
        self,
        io: RecordIo,
        places: Sequence[Place],
        read: Callable[[RecordIo, memoryview], None],
        scratch: memoryview,
    ) -> None:
        try:
            read(io, scratch)
        except CorruptChunk:
            with self._lock:
                self._suspects += places
            raise
