"""How fast this machine moves bytes: a short, bounded measurement of the disk and of memory."""

import mmap
import os
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
from offload.types import round_up

_OPERATION_BYTES: Final = 1 << 20
_NUM_THREADS: Final = 4
_NUM_REPEATS: Final = 3


@dataclass(frozen=True, slots=True)
class DiskBandwidth:
    """Sequential reading and writing, 1 MiB at a time on 4 threads; medians of 3.

    Attributes
    ----------
    read_bytes_per_s, write_bytes_per_s : float
    is_direct : bool
        Measured past the page cache. If not, the figures are a hope rather than a promise.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    is_direct: bool


def measure_disk(directory: Path, num_bytes: int = 128 << 20) -> DiskBandwidth:
    """Write and read a temporary file, past the page cache where the file system allows it.

    Takes a few seconds, and writes and reads ``3 * num_bytes``. Blocks; safe on any thread.

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


def _measure_file(descriptor: int, num_bytes: int, is_direct: bool) -> DiskBandwidth:
    offsets = range(0, num_bytes, _OPERATION_BYTES)
    # O_DIRECT wants aligned memory; bytes that do not compress want to be random.
    buffers = [mmap.mmap(-1, _OPERATION_BYTES) for _ in range(_NUM_THREADS)]
    for buffer in buffers:
        buffer[:] = os.urandom(_OPERATION_BYTES)

    def each(operation: Callable[[int, mmap.mmap, int], None], thread: int) -> None:
        for offset in offsets[thread::_NUM_THREADS]:
            operation(descriptor, buffers[thread], offset)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:

        def write_all() -> None:
            list(pool.map(lambda thread: each(_write, thread), range(_NUM_THREADS)))
            os.fsync(descriptor)

        def read_all() -> None:
            list(pool.map(lambda thread: each(_read, thread), range(_NUM_THREADS)))

        def forget() -> None:
            if not is_direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

        write_s = _median_seconds(write_all)
        read_s = _median_seconds(read_all, before=forget)
    for buffer in buffers:
        buffer.close()
    return DiskBandwidth(num_bytes / read_s, num_bytes / write_s, is_direct)


def _write(descriptor: int, buffer: mmap.mmap, offset: int) -> None:
    _complete(os.pwrite(descriptor, buffer, offset), "wrote", offset)


def _read(descriptor: int, buffer: mmap.mmap, offset: int) -> None:
    _complete(os.preadv(descriptor, [buffer], offset), "read", offset)


def _complete(num_bytes: int, verb: str, offset: int) -> None:
    if num_bytes != _OPERATION_BYTES:
        raise OSError(f"{verb} {num_bytes} of {_OPERATION_BYTES} bytes at {offset}")


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
