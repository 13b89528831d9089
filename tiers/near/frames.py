"""Places of one size in shared memory, lent for the time of a request."""

import threading
from collections.abc import Sequence

from torch import Tensor

from offload.errors import ClosedError, TransferTimeout


class Frames:
    """A bounded number of equal pieces of memory. Whoever finds none free waits (backpressure).

    Any thread may call any method.

    Parameters
    ----------
    memory : Tensor, uint8 [count * frame_bytes]
    frame_bytes : int
        A multiple of the page size.

    Attributes
    ----------
    count : int
    """

    def __init__(self, memory: Tensor, frame_bytes: int) -> None:
        self.count = memory.numel() // frame_bytes
        frames = memory[: self.count * frame_bytes].view(self.count, frame_bytes)
        self._frames: list[Tensor] = list(frames)
        self._free = list(range(self.count))
        self._closed = False
        self._changed = threading.Condition()

    def __getitem__(self, number: int) -> Tensor:
        with self._changed:
            if self._closed:
                raise ClosedError("the disk tier is closed")
            return self._frames[number]

    def take(self, n: int, timeout_s: float, what: str) -> list[int]:
        """Take ``n`` frames, waiting until there are so many.

        Raises
        ------
        TransferTimeout
            Not within ``timeout_s``.
        ClosedError
        """
        assert n <= self.count, (n, self.count)
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or len(self._free) >= n, timeout_s):
                raise TransferTimeout(
                    f"{what}: no {n} of {self.count} shared frames free for {timeout_s} s"
                )
            if self._closed:
                raise ClosedError(f"{what}: the disk tier is closed")
            taken, self._free = self._free[:n], self._free[n:]
            return taken

    def give(self, numbers: Sequence[int]) -> None:
        """Give frames back."""
        with self._changed:
            self._free += numbers
            self._changed.notify_all()

    def close(self) -> None:
        """Let go of the memory, and of all who wait. Idempotent."""
        with self._changed:
            self._closed = True
            self._frames = []
            self._changed.notify_all()
