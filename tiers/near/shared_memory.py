"""Memory that two processes share and that has no name, so that no exit can leave it behind."""

import mmap
import os
import tempfile

import torch
from torch import Tensor

from offload.types import round_up


class SharedMemory:
    """Page-aligned memory behind a file descriptor, which a child process may inherit.

    It goes when the last process that maps it has ended, however that happened.

    Parameters
    ----------
    num_bytes : int
        Rounded up to whole pages.
    fd : int, optional
        Of memory that another process made; ours from here on.

    Attributes
    ----------
    fd : int
    bytes : Tensor, uint8 [num_bytes]
    """

    def __init__(self, num_bytes: int, fd: int | None = None) -> None:
        self.num_bytes = round_up(num_bytes)
        self.fd = _anonymous_file(self.num_bytes) if fd is None else fd
        try:
            mapped = mmap.mmap(self.fd, self.num_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self.bytes: Tensor = torch.frombuffer(mapped, dtype=torch.uint8)  # which keeps the map

    def close(self) -> None:
        """Close the descriptor; the memory itself goes with its last view. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.bytes = torch.empty(0, dtype=torch.uint8)


def _anonymous_file(num_bytes: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("offload-near", os.MFD_CLOEXEC)
    else:
        fd, path = tempfile.mkstemp(prefix="offload-near-")
        os.unlink(path)
    try:
        os.ftruncate(fd, num_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd
