"""Page-locking a region of host memory piece by piece, as it comes into use."""

import torch
from torch import Tensor

from offload.errors import CapacityError

_STEP_BYTES = 256 << 20
"""Registered at a time: locking a whole tier at once would stall the first token for seconds."""


class PinnedPrefix:
    """Keeps a growing prefix of a region page-locked for one CUDA context.

    torch's own pinned allocator rounds a request up to a power of two; registering our region does
    not. Not thread-safe. ``close`` must run before the memory is released.

    Parameters
    ----------
    memory : Tensor, uint8, page-aligned
    """

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._pieces: list[int] = []
        self._locked_bytes = 0

    def extend(self, num_bytes: int) -> None:
        """Page-lock at least the first ``num_bytes``.

        Raises
        ------
        CapacityError
            The system refused. What was locked before stays locked.
        """
        while self._locked_bytes < num_bytes:
            step = min(_STEP_BYTES, self._memory.numel() - self._locked_bytes)
            address = self._memory.data_ptr() + self._locked_bytes
            status = int(torch.cuda.cudart().cudaHostRegister(address, step, 0))
            if status != 0:
                raise CapacityError(
                    f"cannot page-lock {step} more bytes of host memory after "
                    f"{self._locked_bytes} (CUDA error {status}); lower the cpu capacity"
                )
            self._pieces.append(address)
            self._locked_bytes += step

    def close(self) -> None:
        """Unlock everything. Idempotent."""
        while self._pieces:
            torch.cuda.cudart().cudaHostUnregister(self._pieces.pop())
