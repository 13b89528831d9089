"""Measure bandwidths in turn with the contenders: disks and shared machines drift by the minute."""

import mmap
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from offload.bench.clock import timed
from offload.bench.limits import Bandwidths
from offload.errors import ConfigError, StorageError
from offload.machine import accepts_direct_io, existing_parent, read_disk
from offload.tiers.scratch import default_parent

_MEMORY_BYTES: Final = 256 << 20
_REPEATS: Final = 3
_CPU: Final = torch.device("cpu")


class Yardstick:
    """Memory, and a file if the disk is to be measured, that are read over and over.

    The file is written once, so that reading does not compete with what was just written.

    Parameters
    ----------
    device : torch.device
    disk_path : Path or None
        Where the disk tiers are; None: their default.
    has_disk : bool

    Raises
    ------
    ConfigError, StorageError
        The directory has no room, or cannot be used.
    """

    def __init__(
        self, device: torch.device, disk_path: Path | None = None, *, has_disk: bool = False
    ) -> None:
        self._device = device
        self._stack = ExitStack()
        self._memory = torch.ones(_MEMORY_BYTES // 4, device=device)
        directory = existing_parent(disk_path or default_parent())
        self._disk = self._stack.enter_context(DiskProbe(directory)) if has_disk else None
        if device.type == "cuda":
            self._pinned = torch.empty(_MEMORY_BYTES // 4, pin_memory=True)
            self._copied = torch.empty_like(self._memory)

    def measure(self) -> Bandwidths:
        """Return what can be had now. Takes a few tenths of a second, most of it the disk's."""
        # Of the reductions, this is the one that did not compute longer than it read.
        memory_s = min(timed(self._device, self._memory.amax) for _ in range(_REPEATS))
        return Bandwidths(
            memory=_MEMORY_BYTES / memory_s,
            disk=None if self._disk is None else self._disk.measure(),
            bus=self._bus() if self._device.type == "cuda" else None,
        )

    def _bus(self) -> float:
        return _MEMORY_BYTES / min(
            timed(self._device, lambda: self._copied.copy_(self._pinned, non_blocking=True))
            for _ in range(_REPEATS)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


class DiskProbe:
    """A file that is read whole, past the page cache where the file system allows it.

    Parameters
    ----------
    directory : Path
        Exists; the file is removed on exit.
    num_bytes : int
        Whole MiB.
    """

    _OPERATION_BYTES: Final = 1 << 20
    _NUM_THREADS: Final = 4

    def __init__(self, directory: Path, num_bytes: int = 256 << 20) -> None:
        self._directory = directory
        self._num_bytes = num_bytes
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        free_bytes = read_disk(self._directory).free_bytes
        if free_bytes < 2 * self._num_bytes:
            raise ConfigError(
                f"{self._directory}: measuring takes {self._num_bytes} bytes and leaves as many "
                f"free, but only {free_bytes} are free"
            )
        self._is_direct = accepts_direct_io(self._directory)
        with ExitStack() as stack:
            named = tempfile.NamedTemporaryFile(prefix="offload-bench-", dir=self._directory)
            file = stack.enter_context(named)
            flags = os.O_RDWR | (os.O_DIRECT if self._is_direct else 0)
            self._descriptor = os.open(file.name, flags)
            stack.callback(os.close, self._descriptor)
            self._buffers = [
                stack.enter_context(mmap.mmap(-1, self._OPERATION_BYTES))
                for _ in range(self._NUM_THREADS)
            ]
            self._buffers[0][:] = os.urandom(self._OPERATION_BYTES)
            for offset in range(0, self._num_bytes, self._OPERATION_BYTES):
                os.pwrite(self._descriptor, self._buffers[0], offset)
            os.fsync(self._descriptor)
            self._pool = stack.enter_context(ThreadPoolExecutor(self._NUM_THREADS))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def measure(self) -> float:
        """Read the file once; return bytes per second.

        Raises
        ------
        StorageError
            The disk refused.
        """
        if not self._is_direct:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        seconds = timed(
            _CPU, lambda: list(self._pool.map(self._read_share, range(self._NUM_THREADS)))
        )
        return self._num_bytes / seconds

    def _read_share(self, thread: int) -> None:
        step = self._NUM_THREADS * self._OPERATION_BYTES
        for offset in range(thread * self._OPERATION_BYTES, self._num_bytes, step):
            found = os.preadv(self._descriptor, [self._buffers[thread]], offset)
            if found != self._OPERATION_BYTES:
                raise StorageError(
                    f"{self._directory}: read {found} of {self._OPERATION_BYTES} bytes at {offset}"
                )
