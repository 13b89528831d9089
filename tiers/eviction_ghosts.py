"""What is remembered of chunks that are not in a tier, so that they come back as who they were."""

from collections import OrderedDict
from typing import Final, Generic, TypeVar

from offload.errors import ConfigError
from offload.types import ChunkId

T = TypeVar("T")

DEFAULT_GHOSTS: Final = 1 << 16
"""The chunks of 128K tokens in 32 layers; some megabytes."""


class Ghosts(Generic[T]):
    """Records of absent chunks, at most ``limit``; those written longest ago are forgotten.

    Every operation takes constant time. Not thread-safe.

    Parameters
    ----------
    limit : int

    Raises
    ------
    ConfigError
        The limit is negative.
    """

    def __init__(self, limit: int = DEFAULT_GHOSTS) -> None:
        if limit < 0:
            raise ConfigError(f"{limit} chunks cannot be remembered")
        self._limit = limit
        self._records: OrderedDict[ChunkId, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def get(self, chunk: ChunkId) -> T | None:
        """Return the record of a chunk, None if nothing is known of it."""
        return self._records.get(chunk)

    def put(self, chunk: ChunkId, record: T) -> None:
        """Write the record of a chunk, in place of the one it had."""
        self._records[chunk] = record
        self._records.move_to_end(chunk)
        if len(self._records) > self._limit:
            self._records.popitem(last=False)

    def take(self, chunk: ChunkId) -> T | None:
        """Return the record of a chunk that is no longer absent, and forget it here."""
        return self._records.pop(chunk, None)
