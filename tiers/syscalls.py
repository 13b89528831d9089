"""System calls for disk I/O that finish what they begin, and say what went wrong."""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from offload.errors import ConfigError, CorruptChunk, DiskFull, StorageError
from offload.types import PAGE_BYTES

VectoredCall = Callable[[int, Sequence[memoryview], int], int]
"""``os.preadv`` or ``os.pwritev``: (fd, buffers, offset) to bytes moved."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSES_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})
_CANNOT_TELL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""A full disk can still be read."""


def read_fully(
    fd: int, buffers: Sequence[memoryview], offset: int, file: str, preadv: VectoredCall = os.preadv
) -> None:
    """Fill buffers from a file, however many calls that takes.

    Parameters
    ----------
    fd : int
    buffers : sequence of memoryview, uint8
        With ``O_DIRECT``: page-aligned, and whole pages.
    offset : int
    file : str
        Names the file in an error.
    preadv : callable

    Raises
    ------
    CorruptChunk
        The file ends too early.
    StorageError
        The system call failed; with ``EINVAL`` if ``O_DIRECT`` is set and an earlier call stopped
        inside a page, as at the end of a truncated file.
    """
    missing = _move_all("read", fd, buffers, offset, file, preadv)
    if missing:
        what = _describe("read", buffers, offset, file)
        raise CorruptChunk(f"{what}: the file ends {missing} bytes too early")


def write_fully(
    fd: int,
    buffers: Sequence[memoryview],
    offset: int,
    file: str,
    pwritev: VectoredCall = os.pwritev,
) -> None:
    """Write buffers to a file, however many calls that takes.

    Parameters
    ----------
    fd, buffers, offset, file, pwritev
        As in ``read_fully``.

    Raises
    ------
    DiskFull
        No space, quota or file size left.
    StorageError
        The system call failed, or stopped moving bytes.
    """
    missing = _move_all("write", fd, buffers, offset, file, pwritev)
    if missing:
        what = _describe("write", buffers, offset, file)
        raise StorageError(errno.EIO, f"{what}: the system stopped {missing} bytes short")


def as_storage_error(error: OSError, what: str) -> StorageError:
    """Return our error for one of the operating system, with its ``errno``."""
    kind = DiskFull if error.errno in _FULL else StorageError
    return kind(error.errno, f"{what}: {error.strerror or error}")


def supports_direct_io(directory: Path) -> bool:
    """Return whether ``O_DIRECT`` works in a directory, by writing and reading one page.

    Raises
    ------
    ConfigError
        No file can be written there at all.
    """
    page = mmap.mmap(-1, PAGE_BYTES)
    try:
        fd = open_nameless(directory)
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL) | getattr(os, "O_DIRECT", 0)
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
            return os.pwritev(fd, [page], 0) == os.preadv(fd, [page], 0) == PAGE_BYTES
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in _REFUSES_DIRECT | _CANNOT_TELL:
            return False
        raise ConfigError(f"cannot write in {directory}: {error.strerror}") from error


def open_nameless(directory: Path) -> int:
    """Open a new file that is gone when it is closed, even if the process is killed."""
    if hasattr(os, "O_TMPFILE"):
        with contextlib.suppress(OSError):  # the other way says what is wrong
            return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    path = directory / f".probe-{secrets.token_hex(8)}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.unlink(path)
    return fd


def _move_all(
    verb: str,
    fd: int,
    buffers: Sequence[memoryview],
    offset: int,
    file: str,
    call: VectoredCall,
) -> int:
    """Call until every byte has moved or no more do; return how many are missing."""
    total = sum(map(len, buffers))
    reached = 0
    while reached < total:
        try:
            moved = call(fd, _skip(buffers, reached), offset + reached)
        except InterruptedError:
            continue
        except OSError as error:
            raise as_storage_error(error, _describe(verb, buffers, offset, file)) from error
        if moved == 0:
            break
        reached += moved
    return total - reached


def _describe(verb: str, buffers: Sequence[memoryview], offset: int, file: str) -> str:
    return f"{verb} of {sum(map(len, buffers))} bytes at offset {offset} of {file}"


def _skip(buffers: Sequence[memoryview], num_bytes: int) -> Sequence[memoryview]:
    """Return what is left of buffers after their first ``num_bytes``."""
    if num_bytes == 0:
        return buffers
    left: list[memoryview] = []
    for buffer in buffers:
        if num_bytes < len(buffer):
            left.append(buffer[num_bytes:])
        num_bytes = max(0, num_bytes - len(buffer))
    return left
