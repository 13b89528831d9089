"""Who leaves a full tier. Policies rank chunks; they never touch bytes."""

from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Protocol

from offload.types import ChunkId


class EvictionPolicy(Protocol):
    """Ranks the chunks of one tier. Never sees bytes; not thread-safe."""

    def insert(self, chunk: ChunkId) -> None:
        """Note that a chunk now lives in the tier."""
        ...

    def touch(self, chunks: Iterable[ChunkId]) -> None:
        """Note that chunks were read. Unknown ones are ignored."""
        ...

    def remove(self, chunk: ChunkId) -> None:
        """Forget a chunk that left."""
        ...

    def victims(self, n: int, exclude: Collection[ChunkId] = ()) -> list[ChunkId]:
        """Return up to ``n`` chunks that should make room for newcomers, first to go first."""
        ...


class KeepFirst:
    """Newcomers never displace residents; they go down instead.

    The best policy for exact attention, which reads every chunk once per step in the same order: of
    a cyclic scan over more than fits, any fixed resident set is hit on every pass, whereas
    least-recently-used is hit on none.
    """

    def __init__(self) -> None:
        self._chunks: set[ChunkId] = set()

    def insert(self, chunk: ChunkId) -> None:
        """Note that a chunk now lives in the tier."""
        self._chunks.add(chunk)

    def touch(self, chunks: Iterable[ChunkId]) -> None:
        """Note that chunks were read."""
        return

    def remove(self, chunk: ChunkId) -> None:
        """Forget a chunk that left."""
        self._chunks.discard(chunk)

    def victims(self, n: int, exclude: Collection[ChunkId] = ()) -> list[ChunkId]:
        """Return up to ``n`` chunks to move out, first to go first."""
        return []


class LeastRecentlyUsed:
    """The chunk that was not read for the longest time goes first. For sparse reads."""

    def __init__(self) -> None:
        self._order: OrderedDict[ChunkId, None] = OrderedDict()

    def insert(self, chunk: ChunkId) -> None:
        """Note that a chunk now lives in the tier."""
        self._order[chunk] = None

    def touch(self, chunks: Iterable[ChunkId]) -> None:
        """Note that chunks were read."""
        for chunk in chunks:
            if chunk in self._order:
                self._order.move_to_end(chunk)

    def remove(self, chunk: ChunkId) -> None:
        """Forget a chunk that left."""
        self._order.pop(chunk, None)

    def victims(self, n: int, exclude: Collection[ChunkId] = ()) -> list[ChunkId]:
        """Return up to ``n`` chunks to move out, first to go first."""
        found: list[ChunkId] = []
        for chunk in self._order:
            if len(found) == n:
                break
            if chunk not in exclude:
                found.append(chunk)
        return found
