"""Give a part of a file back to the file system, or set some aside."""

import ctypes
import errno
import functools
from collections.abc import Callable

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02

CANNOT_PUNCH = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})
"""What a file system answers that has no holes."""


def punch_hole(fd: int, offset: int, num_bytes: int) -> int:
    """Deallocate a range of a file, which then reads as zeros; return 0 or an ``errno``.

    Parameters
    ----------
    fd : int
        Open for writing.
    offset, num_bytes : int
        Whole blocks of the file system; parts of blocks are zeroed, not given back.
    """
    return _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, num_bytes)


def reserve(fd: int, num_bytes: int) -> int:
    """Set space aside for the first bytes of a file, whose size stays; return 0 or an ``errno``."""
    return _fallocate(fd, _KEEP_SIZE, 0, num_bytes)


def _fallocate(fd: int, mode: int, offset: int, num_bytes: int) -> int:
    call = _find_fallocate()
    if call is None:
        return errno.ENOSYS
    return 0 if call(fd, mode, offset, num_bytes) == 0 else ctypes.get_errno()


@functools.cache
def _find_fallocate() -> Callable[[int, int, int, int], int] | None:
    """Return fallocate(2), which Python offers without its modes only; None if there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return call
