"""Records of somebody else's files, which a disk tier reads but never changes."""

import threading
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from offload.errors import CorruptChunk
from offload.tiers.io_engine import Job
from offload.tiers.record_io import Place, RecordIo
from offload.tiers.segment import locate, slot_at
from offload.tiers.segment_files import SegmentFiles
from offload.types import SlotId


class AdoptedFiles:
    """Which segments are files of others, and which of their records met corruption.

    A file is forgotten when its last slot is given back: who saves and loads for days meets files
    without end. One thread adopts and gives back; any thread may run jobs and take suspects.

    Parameters
    ----------
    files : SegmentFiles
    """

    def __init__(self, files: SegmentFiles) -> None:
        self._files = files
        self._numbers: dict[Path, int] = {}
        self._io: dict[int, RecordIo] = {}
        self._slots: dict[int, set[SlotId]] = {}
        self._suspects: list[tuple[Path, int]] = []
        self._lock = threading.Lock()

    def __contains__(self, segment: int) -> bool:
        return segment in self._io

    def adopt(
        self,
        path: Path,
        indexes: Sequence[int],
        reserve: Callable[[], int],
        make: Callable[[], RecordIo],
    ) -> list[SlotId]:
        """Return slots for records of a file, until they are given back.

        Parameters
        ----------
        path : Path
        indexes : sequence of int
        reserve : callable
            Returns a number for a file that is new.
        make : callable
            Returns what reads its records.
        """
        number = self._numbers.get(path)
        if number is None:
            number = self._numbers[path] = reserve()
            self._io[number], self._slots[number] = make(), set()
            self._files.adopt(number, path)
        slots = [slot_at(number, index) for index in indexes]
        self._slots[number].update(slots)
        return slots

    def give_back(self, slots: Collection[SlotId]) -> list[SlotId]:
        """Forget slots, and files that have none any more; return those that were not adopted."""
        own = []
        for slot in slots:
            number = locate(slot)[0]
            if number not in self._io:
                own.append(slot)
                continue
            self._slots[number].discard(slot)
            if not self._slots[number]:
                del self._slots[number], self._io[number]
                del self._numbers[self._files.forget(number)]
        return own

    def job(self, places: Sequence[Place], read: Callable[[RecordIo, memoryview], None]) -> Job:
        """Return a job that reads records of one adopted segment, and notes corruption."""
        return partial(self._run, self._io[places[0][0]], places, read)

    def take_suspects(self) -> list[tuple[Path, int]]:
        """Return the file and index of records in reads that met corruption, once."""
        with self._lock:
            suspects, self._suspects = self._suspects, []
        return suspects

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
                self._suspects += [(self._files.path(number), index) for number, index in places]
            raise
