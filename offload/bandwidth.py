"""How fast this machine moves bytes: short, bounded measurements of disk, memory and the bus."""

import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from offload.errors import ConfigError, StorageError
from offload.machine import accepts_direct_io, read_disk
from offload.types import PAGE_BYTES, round_up

_OPERATION_BYTES: Final = 1 << 20
_NUM_THREADS: Final = 4
_NUM_REPEATS: Final = 3

PIECE_BYTES: Final = 32 << 10
"""What is read at random: one head of a chunk of 64 tokens, in bfloat16, K and V of 128."""

_NUM_PIECES: Final = 128
_NUM_PAGES: Final = 32

_Operation = Callable[[int, memoryview, int], None]
"""Reads or writes: descriptor, buffer, offset."""


@dataclass(frozen=True, slots=True)
class DiskBandwidth:
    """How fast a disk is, on 4 threads; medians of 3.

    Attributes
    ----------
    read_bytes_per_s, write_bytes_per_s : float
        Sequentially, 1 MiB at a time.
    is_direct : bool
        Measured past the page cache. If not, the figures are a hope rather than a promise.
    read_latency_s : float
        Of one read of a page, with nothing else under way.
    pieces_per_s : float
        Reads of ``PIECE_BYTES``, at random.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    is_direct: bool
    read_latency_s: float
    pieces_per_s: float


def measure_disk(directory: Path, num_bytes: int = 128 << 20) -> DiskBandwidth:
    """Write and read a temporary file, past the page cache where the file system allows it.

    Writes and reads ``3 * num_bytes`` and a few megabytes. Blocks; safe on any thread.

    Parameters
    ----------
    directory : Path
        An existing directory; the file is removed again.
    num_bytes : int
        Size of the file; rounded up to whole MiB.

    Raises
    ------
    ConfigError
        The directory cannot be written, or has less than twice ``num_bytes`` free.
    StorageError
        The disk refused while it was measured.
    """
    num_bytes = round_up(num_bytes, _OPERATION_BYTES)
    free_bytes = read_disk(directory).free_bytes
    if free_bytes < 2 * num_bytes:
        raise ConfigError(
            f"{directory}: measuring takes {num_bytes} bytes and leaves as many free, "
            f"but only {free_bytes} are free"
        )
    is_direct = accepts_direct_io(directory)
    try:
        with tempfile.NamedTemporaryFile(prefix="offload-probe-", dir=directory) as file:
            flags = os.O_RDWR | (os.O_DIRECT if is_direct else 0)
            descriptor = os.open(file.name, flags)
            try:
                return _measure_file(descriptor, num_bytes, is_direct)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise StorageError(f"{directory}: cannot be measured: {error}") from error


def measure_memcpy(num_bytes: int = 256 << 20) -> float:
    """Copy host memory to host memory on torch's threads; return bytes copied per second.

    Parameters
    ----------
    num_bytes : int
        Size of the source; more than the last-level cache, or the figure is the cache's.
    """
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return num_bytes / _median_seconds(lambda: target.copy_(source))


def measure_memory_read(device: torch.device, num_bytes: int = 64 << 20) -> float:
    """Read memory of a device, on the CPU with torch's threads; return bytes per second.

    Parameters
    ----------
    device : torch.device
    num_bytes : int
        More than the last-level cache, or the figure is the cache's.
    """
    # The sum of integers is the reduction that comes closest to the memory's speed in torch.
    source = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)
    return source.nbytes / _median_seconds(lambda: source.sum().item())


def measure_link(device: torch.device, num_bytes: int = 64 << 20) -> float:
    """Copy page-locked host memory to a device, the CPU included; return bytes per second."""
    source = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        wait_for(device)

    return num_bytes / _median_seconds(copy)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure_file(descriptor: int, num_bytes: int, is_direct: bool) -> DiskBandwidth:
    # Random as the order of the reads has to be, but the same at every run.
    order, starts = random.Random(0), range(0, num_bytes, PIECE_BYTES)
    blocks = [(start, _OPERATION_BYTES) for start in range(0, num_bytes, _OPERATION_BYTES)]
    pieces = [(order.choice(starts), PIECE_BYTES) for _ in range(_NUM_PIECES)]
    pages = [(order.choice(starts), PAGE_BYTES) for _ in range(_NUM_PAGES)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        probe = _Probe(descriptor, is_direct, pool)
        write_s = probe.seconds(_write, blocks, _NUM_THREADS)
        read_s = probe.seconds(_read, blocks, _NUM_THREADS)
        pages_s = probe.seconds(_read, pages, 1)
        pieces_s = probe.seconds(_read, pieces, _NUM_THREADS)
    return DiskBandwidth(
        num_bytes / read_s,
        num_bytes / write_s,
        is_direct,
        pages_s / _NUM_PAGES,
        _NUM_PIECES / pieces_s,
    )


class _Probe:
    """Times reads and writes of one file."""

    def __init__(self, descriptor: int, is_direct: bool, pool: ThreadPoolExecutor) -> None:
        self._descriptor = descriptor
        self._forgets = not is_direct and hasattr(os, "posix_fadvise")
        self._pool = pool
        # O_DIRECT wants aligned memory; bytes that do not compress want to be random.
        self._buffers = [mmap.mmap(-1, _OPERATION_BYTES) for _ in range(_NUM_THREADS)]
        for buffer in self._buffers:
            buffer[:] = os.urandom(_OPERATION_BYTES)

    def seconds(
        self, operation: _Operation, jobs: list[tuple[int, int]], num_threads: int
    ) -> float:
        """Return how long the jobs, each an offset and a size, take on so many threads."""

        def work(thread: int) -> None:
            buffer = memoryview(self._buffers[thread])
            for offset, size in jobs[thread::num_threads]:
                operation(self._descriptor, buffer[:size], offset)

        def run() -> None:
            list(self._pool.map(work, range(num_threads)))
            if operation is _write:
                os.fsync(self._descriptor)

        return _median_seconds(run, before=self._forget)

    def _forget(self) -> None:
        if self._forgets:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _write(descriptor: int, buffer: memoryview, offset: int) -> None:
    _complete(os.pwrite(descriptor, buffer, offset), len(buffer), "wrote", offset)


def _read(descriptor: int, buffer: memoryview, offset: int) -> None:
    _complete(os.preadv(descriptor, [buffer], offset), len(buffer), "read", offset)


def _complete(num_bytes: int, wanted_bytes: int, verb: str, offset: int) -> None:
    if num_bytes != wanted_bytes:
        raise OSError(f"{verb} {num_bytes} of {wanted_bytes} bytes at {offset}")


def _median_seconds(
    action: Callable[[], object], before: Callable[[], object] = lambda: None
) -> float:
    seconds = []
    for _ in range(_NUM_REPEATS):
        before()
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
