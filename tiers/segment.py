"""Append-only segment files: where the records of a disk tier lie, and the files themselves."""

import ctypes
import errno
import logging
import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from offload.errors import CapacityError, ConfigError
from offload.tiers.io_engine import as_storage_error
from offload.types import PAGE_BYTES, SlotId

_LOG = logging.getLogger(__name__)

_SUFFIX = ".kvseg"
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
_CANNOT_PUNCH = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})


class Hole(NamedTuple):
    """A run of dead records inside a living segment."""

    segment: int
    first: int
    num_records: int


class Freed(NamedTuple):
    """What a ``free`` left behind: files to unlink, and holes to punch."""

    dead_segments: list[int]
    holes: list[Hole]


@dataclass(slots=True)
class _Segment:
    stream: int
    live: set[int] = field(default_factory=set)
    num_appended: int = 0
    num_dead: int = 0
    """Records that are dead but still take up space."""


class SegmentTable:
    """Which positions of which segments hold records. Bookkeeping only, no I/O.

    A slot is a position: segment number times ``records_per_segment``, plus the index in the
    segment. Positions are handed out in order within a stream's open segment and never twice, so a
    stale slot can never name another chunk's record.

    Invariant: ``num_used`` counts every record whose space is not given back, and never exceeds
    ``num_slots``. Not thread-safe.

    Parameters
    ----------
    num_slots : int
        Records that may take up space at any time.
    records_per_segment : int
    """

    def __init__(self, num_slots: int, records_per_segment: int) -> None:
        self.num_slots = num_slots
        self.records_per_segment = records_per_segment
        self.num_used = 0
        self._segments: dict[int, _Segment] = {}
        self._open: dict[int, int] = {}
        self._next_segment = 0

    def allocate(self, n: int, stream: int) -> list[SlotId]:
        """Take the next ``n`` positions of a stream, or raise CapacityError and take none."""
        free = self.num_slots - self.num_used
        if n > free:
            raise CapacityError(f"{n} slots requested, {free} free of {self.num_slots}")
        self.num_used += n
        slots: list[SlotId] = []
        while len(slots) < n:
            number = self._open_segment(stream)
            segment = self._segments[number]
            first = segment.num_appended
            segment.num_appended = min(self.records_per_segment, first + n - len(slots))
            indexes = range(first, segment.num_appended)
            segment.live.update(indexes)
            base = number * self.records_per_segment
            slots += [SlotId(base + index) for index in indexes]
        return slots

    def holds(self, slot: SlotId) -> bool:
        """Return whether a slot was allocated and not freed."""
        number, index = self.locate(slot)
        return number in self._segments and index in self._segments[number].live

    def locate(self, slot: SlotId) -> tuple[int, int]:
        """Return the segment and the index in it of a slot, alive or not."""
        return divmod(slot, self.records_per_segment)

    def free(self, slots: Collection[SlotId]) -> Freed:
        """Declare records dead.

        The space of dead segments counts as given back; that of holes only after ``punched``.
        """
        touched: dict[int, list[int]] = {}
        for slot in sorted(slots):
            number, index = self.locate(slot)
            self._segments[number].live.remove(index)
            touched.setdefault(number, []).append(index)
        freed = Freed([], [])
        for number, indexes in touched.items():
            segment = self._segments[number]
            segment.num_dead += len(indexes)
            if segment.live:
                freed.holes.extend(Hole(number, *run) for run in _runs(indexes))
            else:
                self._forget(number)
                freed.dead_segments.append(number)
        return freed

    def punched(self, hole: Hole) -> None:
        """Count the space of a hole as given back."""
        self._segments[hole.segment].num_dead -= hole.num_records
        self.num_used -= hole.num_records

    @property
    def segments(self) -> list[int]:
        """Numbers of the segments that are not dead."""
        return list(self._segments)

    def check_integrity(self) -> None:
        """Raise AssertionError if the counts are not those of the segments."""
        counted = sum(len(seg.live) + seg.num_dead for seg in self._segments.values())
        assert counted == self.num_used <= self.num_slots, (counted, self.num_used, self.num_slots)
        for stream, number in self._open.items():
            assert self._segments[number].stream == stream
        for segment in self._segments.values():
            assert segment.live
            assert max(segment.live) < segment.num_appended <= self.records_per_segment

    def _open_segment(self, stream: int) -> int:
        number = self._open.get(stream)
        if number is None or self._segments[number].num_appended == self.records_per_segment:
            number = self._next_segment
            self._next_segment += 1
            self._segments[number] = _Segment(stream)
            self._open[stream] = number
        return number

    def _forget(self, number: int) -> None:
        segment = self._segments.pop(number)
        self.num_used -= segment.num_dead
        if self._open.get(segment.stream) == number:
            del self._open[segment.stream]


class SegmentFiles:
    """The files of the segments of one tier, in one directory.

    A file is opened for each operation: 3 µs against the 100 µs and more that the operation takes,
    and no number of segments can use up the file descriptors. Names are made of a random token of
    this object and a number, so two tiers may share a directory. Any thread may call any method.

    Parameters
    ----------
    directory : Path
        Made, for the owner only, if it is missing.

    Raises
    ------
    ConfigError
        The directory cannot be made or used.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._token = secrets.token_hex(4)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            block_bytes = os.statvfs(directory).f_frsize
        except OSError as error:
            raise ConfigError(f"cannot use {directory}: {error.strerror}") from error
        # Records start on pages, and a hole gives back whole file system blocks only.
        self._can_punch = PAGE_BYTES % block_bytes == 0

    def path(self, segment: int) -> Path:
        """Return the file of a segment."""
        return self.directory / f"{self._token}-{segment:010d}{_SUFFIX}"

    @contextmanager
    def open(self, segment: int, *, writing: bool, direct: bool) -> Iterator[int]:
        """Open the file of a segment, made if it is to be written.

        Raises
        ------
        StorageError
            It cannot be opened.
        """
        flags = os.O_RDWR | os.O_CREAT if writing else os.O_RDONLY
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        path = self.path(segment)
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise as_storage_error(error, f"cannot open {path}") from error
        try:
            yield fd
        finally:
            os.close(fd)

    def punch(self, segment: int, offset: int, num_bytes: int) -> bool:
        """Give the space of a range back to the file system; False if it cannot."""
        if not self.path(segment).exists():
            return True  # never written
        if not self._can_punch:
            return False
        with self.open(segment, writing=True, direct=False) as fd:
            code = _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, num_bytes)
        if code == 0:
            return True
        if code in _CANNOT_PUNCH:
            self._can_punch = False
        _LOG.warning(
            "cannot punch holes into %s (%s): space of dead records comes back by whole segments",
            self.directory,
            os.strerror(code),
        )
        return False

    def unlink(self, segment: int) -> None:
        """Remove the file of a segment, if it was ever written.

        Raises
        ------
        StorageError
            It cannot be removed.
        """
        path = self.path(segment)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise as_storage_error(error, f"cannot remove {path}") from error


def _runs(indexes: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each run of consecutive numbers; ``indexes`` is sorted."""
    first = last = indexes[0]
    for index in indexes[1:]:
        if index != last + 1:
            yield first, last - first + 1
            first = index
        last = index
    yield first, last - first + 1


def _fallocate(fd: int, mode: int, offset: int, num_bytes: int) -> int:
    """Call fallocate(2), which Python does not offer with a mode; return 0 or an ``errno``."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is None:
        return errno.ENOSYS
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return 0 if call(fd, mode, offset, num_bytes) == 0 else ctypes.get_errno()
