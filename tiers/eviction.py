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


class Ranking(EvictionPolicy, Protocol):
    """A policy that can compare chunks of its tier with those of other tiers."""

    def worth(self, chunk: ChunkId) -> float:
        """Return what having a chunk in the tier is worth: the more, the later it goes.

        Numbers mean nothing by themselves, and are compared with those of the same moment only. Of
        a chunk that is not in the tier: what it would be worth if it came in now.
        """
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
        self._order: OrderedDict[ChunkId, int] = OrderedDict()
        self._num_touches = 0

    def insert(self, chunk: ChunkId) -> None:
        """Note that a chunk now lives in the tier."""
        self._order[chunk] = self._num_touches

    def touch(self, chunks: Iterable[ChunkId]) -> None:
        """Note that chunks were read."""
        self._num_touches += 1
        for chunk in chunks:
            if chunk in self._order:
                self._order[chunk] = self._num_touches
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

    def worth(self, chunk: ChunkId) -> float:
        """Return when a chunk was last read; one that is not in the tier: just now."""
        return self._order.get(chunk, self._num_touches)
