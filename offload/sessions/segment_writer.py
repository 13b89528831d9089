"""Write the records of a new segment, many at a time."""

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from offload.sessions.paths import temporary
from offload.tiers.io_engine import IoEngine, Job
from offload.tiers.pool import page_aligned
from offload.tiers.record import RecordFormat
from offload.tiers.record_io import RecordIo
from offload.tiers.segment_files import SegmentFiles
from offload.tiers.syscalls import as_storage_error
from offload.tiers.transfer import FutureTransfer, Transfer
from offload.types import ChunkInfo

_BURST_BYTES = 8 << 20
_SEGMENT = 0
_THREADS = 4

ReadChunks = Callable[[Sequence[int], Sequence[Tensor]], Transfer]
"""Begin to fill host buffers with the chunks of these records, by index."""


class SegmentWriter:
    """A new segment under its temporary name.

    Parameters
    ----------
    path : Path
        The final name.
    fmt : RecordFormat
    infos : sequence of ChunkInfo
        One per record, in the order of the file.
    deadline_s : float
        Longest wait for one transfer.

    Raises
    ------
    DiskFull
        The whole file does not fit on the device.
    """

    def __init__(
        self,
        path: Path,
        fmt: RecordFormat,
        infos: Sequence[ChunkInfo],
        *,
        deadline_s: float,
    ) -> None:
        self._infos = infos
        self._fmt = fmt
        self._deadline_s = deadline_s
        self._path = temporary(path)
        self.num_bytes = len(infos) * fmt.record_bytes
        files = SegmentFiles(path.parent)
        files.adopt(_SEGMENT, self._path)
        self._allocate()
        self._io = RecordIo(files, fmt)
        self._engine = IoEngine(_THREADS, deadline_s=deadline_s)

    def fill(self, read: ReadChunks, progress: Callable[[int], object]) -> None:
        """Write every record, reading the next chunks while the last ones are written.

        Parameters
        ----------
        read : callable
        progress : callable
            Told after each burst how many more records are written.

        Raises
        ------
        CorruptChunk, StorageError, TransferTimeout
            A chunk could not be read or written.
        """
        slot_bytes = self._fmt.layout.slot_bytes
        burst = max(1, min(len(self._infos), _BURST_BYTES // slot_bytes))
        buffers = page_aligned(2 * burst * slot_bytes).view(2, burst, slot_bytes)
        writing: tuple[Transfer, int] | None = None
        try:
            for number, start in enumerate(range(0, len(self._infos), burst)):
                indexes = range(start, min(start + burst, len(self._infos)))
                part = list(buffers[number % 2][: len(indexes)])
                read(indexes, part).wait(self._deadline_s)
                if writing is not None:
                    writing[0].wait(self._deadline_s)
                    progress(writing[1])
                writing = self._write(indexes, part), len(indexes)
        finally:
            if writing is not None:
                writing[0].wait(self._deadline_s)
        if writing is not None:
            progress(writing[1])

    def sync(self) -> None:
        """Make the content survive a power cut."""
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)
        except OSError as error:
            raise as_storage_error(error, f"sync of {self._path}") from error
        finally:
            os.close(fd)

    def close(self) -> None:
        """Stop the threads; the file stays, under its temporary name."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, indexes: Sequence[int], buffers: list[Tensor]) -> Transfer:
        ops = self._io.plan([(_SEGMENT, index) for index in indexes], self._engine.num_threads)
        infos = [self._infos[index] for index in indexes]
        jobs: list[Job] = [partial(self._io.write, op, infos, buffers) for op in ops]
        what = f"write of {len(indexes)} records to {self._path}"
        num_bytes = len(indexes) * self._fmt.record_bytes
        return FutureTransfer(what, num_bytes, self._engine.submit(jobs, urgent=False))

    def _allocate(self) -> None:
        """Make the file at its full size, so that a full device is found before any work."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self._path, flags, 0o600)
        except OSError as error:
            raise as_storage_error(error, f"cannot make {self._path}") from error
        try:
            if self.num_bytes:
                os.posix_fallocate(fd, 0, self.num_bytes)
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
            what = f"no room for {self.num_bytes} bytes in {self._path}"
            raise as_storage_error(error, what) from error
        finally:
            os.close(fd)
