"""Page-locking a region of host memory piece by piece, as it comes into use."""

import torch
from torch import Tensor

from offload.errors import CapacityError

_PIECE_BYTES = 64 << 20
"""Registered at a time: locking a whole tier at once would stall the first token for seconds."""


class PinnedRegion:
    """Keeps the pieces of a region that are in use page-locked for CUDA.

    torch's own pinned allocator rounds a request up to a power of two; registering our region does
    not. Not thread-safe. ``close`` must run before the memory is released.

    Parameters
    ----------
    memory : Tensor, uint8, page-aligned
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._locked: dict[int, int] = {}

    def lock(self, start: int, stop: int) -> None:
        """Page-lock at least the bytes from ``start`` to ``stop``.

        Raises
        ------
        CapacityError
            The system refused. What was locked before stays locked.
        """
        for piece in range(start // _PIECE_BYTES, (stop - 1) // _PIECE_BYTES + 1):
            if piece not in self._locked:
                self._locked[piece] = self._register(piece * _PIECE_BYTES)

    def close(self) -> None:
        """Unlock everything. Idempotent."""
        while self._locked:
            _, address = self._locked.popitem()
            torch.cuda.cudart().cudaHostUnregister(address)

    def _register(self, offset: int) -> int:
        size = min(_PIECE_BYTES, self._memory.numel() - offset)
        address = self._memory.data_ptr() + offset
        status = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if status != 0:
            raise CapacityError(
                f"cannot page-lock {size} more bytes of host memory after "
                f"{len(self._locked)} pieces of {_PIECE_BYTES} (CUDA error {status}); "
                "lower the cpu capacity"
            )
        return address
