"""Who leaves a full tier. Policies rank chunks; they never touch bytes.

Those that know of chunks only that they were read are here; those that know how much attention they
got are in the other ``eviction_*`` files.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
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

    def observe(self, masses: Mapping[ChunkId, float]) -> None:
        """Note how much attention chunks got in one step; called once a step, for all layers.

        Parameters
        ----------
        masses : mapping of ChunkId to float
            Share of a layer's attention that went to a chunk, 0 to 1, the mean over its heads. It
            may name chunks of other tiers; those it does not name got none that is known of.
        """
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

    def observe(self, masses: Mapping[ChunkId, float]) -> None:
        """Attention changes nothing."""
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

    def observe(self, masses: Mapping[ChunkId, float]) -> None:
        """Attention changes nothing; reads do."""
        return

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
