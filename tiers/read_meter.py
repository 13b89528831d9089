"""What reading a disk's records came to."""

import threading
from typing import NamedTuple


class Fetched(NamedTuple):
    """Read so far.

    Attributes
    ----------
    num_bytes : int
        As they are stored, headers and what lies between included.
    num_reads : int
        Requests.
    """

    num_bytes: int
    num_reads: int


class ReadMeter:
    """Counts reads, and how long decoding takes. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fetched = Fetched(0, 0)
        self._decoded: dict[int, tuple[int, float]] = {}

    @property
    def fetched(self) -> Fetched:
        """What was read so far."""
        return self._fetched

    def add(self, num_bytes: int, num_reads: int) -> None:
        """Count reads."""
        with self._lock:
            so_far = self._fetched
            self._fetched = Fetched(so_far.num_bytes + num_bytes, so_far.num_reads + num_reads)

    def add_decoded(self, codec: int, num_bytes: int, seconds: float) -> None:
        """Count bytes, as they are decoded, and the time of the thread that decoded them."""
        with self._lock:
            bytes_so_far, seconds_so_far = self._decoded.get(codec, (0, 0.0))
            self._decoded[codec] = bytes_so_far + num_bytes, seconds_so_far + seconds

    def take_decoded(self) -> dict[int, tuple[int, float]]:
        """Return, by number of the codec, bytes and seconds since the last call."""
        with self._lock:
            taken, self._decoded = self._decoded, {}
        return taken
