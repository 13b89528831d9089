"""Many small reads at once: the kernel's own asynchronous I/O (io_submit), by direct system calls.

One thread keeps the whole queue of a disk full, for 5 µs of processor time a read. ``preadv`` from
eight threads of Python takes 100 µs, most of it waiting for each other. The kernel reads without
waiting only where ``O_DIRECT`` is used. io_uring would do as well, but containers often forbid it,
and Python packages for either own the memory that they read into.
"""

import ctypes
import errno
import os
import platform
import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_CALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Numbers of io_setup, io_destroy, io_getevents and io_submit."""

_DEPTH = 128
"""Reads of one thread under way; more gains nothing."""

_READ = 0
_REQUEST = np.dtype(
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("flags", "<u4"),
        ("operation", "<u2"),
        ("priority", "<i2"),
        ("fd", "<u4"),
        ("address", "<u8"),
        ("num_bytes", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("more_flags", "<u4"),
        ("event_fd", "<u4"),
    ]
)
"""``struct iocb`` of linux/aio_abi.h."""
_EVENT = np.dtype([("data", "<u8"), ("request", "<u8"), ("result", "<i8"), ("more", "<i8")])

_libc = ctypes.CDLL(None, use_errno=True)


class ReadQueue:
    """Asynchronous reads of one thread.

    Raises
    ------
    OSError
        The kernel refuses: it has no such calls, or too many reads are under way system-wide.
    """

    def __init__(self) -> None:
        numbers = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
        if numbers is None:
            raise OSError(errno.ENOSYS, "no asynchronous reads on this platform")
        self._setup, self._destroy, self._collect, self._submit = numbers
        self._context = ctypes.c_ulong(0)
        _check(_libc.syscall(self._setup, _DEPTH, ctypes.byref(self._context)))
        self._requests = np.zeros(_DEPTH, _REQUEST)
        self._requests["operation"] = _READ
        self._requests["data"] = np.arange(_DEPTH)
        self._pointers = self._requests.ctypes.data + _REQUEST.itemsize * np.arange(_DEPTH)
        self._events = np.zeros(_DEPTH, _EVENT)

    def read(self, fd: int | Ints, offsets: Ints, addresses: Ints, num_bytes: Ints) -> bool:
        """Read pieces of files into memory and wait for all of them.

        Parameters
        ----------
        fd : int, or ndarray, int64 [n]
            Opened with ``O_DIRECT``: of the one file, or of each piece.
        offsets, addresses, num_bytes : ndarray, int64 [n]
            Of each piece; whole pages. The memory must stay until this returns.

        Returns
        -------
        bool
            Whether every piece was read in full. If not, reading them one by one says why.
        """
        is_whole = True
        fds = np.broadcast_to(fd, len(offsets))
        for first in range(0, len(offsets), _DEPTH):
            part = slice(first, first + _DEPTH)
            count = len(offsets[part])
            requests = self._requests[:count]
            requests["fd"] = fds[part]
            requests["offset"] = offsets[part]
            requests["address"] = addresses[part]
            requests["num_bytes"] = num_bytes[part]
            is_whole &= self._run(count, num_bytes[part])
        return is_whole

    def __del__(self, system: Any = _libc.syscall) -> None:
        # An argument, because the module may be gone by the time the last thread ends.
        if getattr(self, "_context", None):
            system(self._destroy, self._context)

    def _run(self, count: int, expected: Ints) -> bool:
        """Submit the first requests and wait for those that the kernel took."""
        submitted = 0
        while submitted < count:
            pointers = ctypes.c_void_p(int(self._pointers.ctypes.data) + 8 * submitted)
            number = ctypes.c_long(count - submitted)
            taken = _libc.syscall(self._submit, self._context, number, pointers)
            if taken <= 0:
                break
            submitted += taken
        is_whole = submitted == count
        collected = 0
        while collected < submitted:
            left, events = submitted - collected, ctypes.c_void_p(self._events.ctypes.data)
            number = ctypes.c_long(left)
            found = _libc.syscall(self._collect, self._context, number, number, events, None)
            if found < 0 and ctypes.get_errno() != errno.EINTR:
                raise OSError(ctypes.get_errno(), f"lost sight of {left} reads under way")
            ended = self._events[: max(0, found)]
            wanted = expected[ended["data"].astype(np.int64)]
            is_whole &= np.array_equal(ended["result"], wanted)
            collected += max(0, found)
        return is_whole


_local = threading.local()


def thread_queue() -> ReadQueue | None:
    """Return this thread's queue; None where the kernel has none to give."""
    if not hasattr(_local, "queue"):
        try:
            _local.queue = ReadQueue()
        except OSError:
            _local.queue = None
    queue: ReadQueue | None = _local.queue
    return queue


def _check(result: int) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
