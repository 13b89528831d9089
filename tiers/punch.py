"""Give a part of a file back to the file system."""

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
    call = _fallocate()
    if call is None:
        return errno.ENOSYS
    return 0 if call(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, num_bytes) == 0 else ctypes.get_errno()


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    """Return fallocate(2), which Python does not offer with a mode; None where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return call
