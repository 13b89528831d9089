"""The lowest of many ranks that only rise."""

import heapq
from collections.abc import Collection

from offload.types import ChunkId

_SPARE = 64
"""Entries of chunks that left, beside as many as there are chunks, before the heap is made anew."""


class RisingRanks:
    """Chunks with a rank each, which never falls.

    Invariant: the heap has an entry for every chunk, with a rank no higher than its own. So a rise
    leaves the heap alone, and an entry is brought up to date when it comes to the top: inserting
    and raising take a few dictionary accesses, finding the lowest ``n`` a few heap operations for
    each one found, left or risen meanwhile. Not thread-safe.
    """

    def __init__(self) -> None:
        self._ranks: dict[ChunkId, float] = {}
        self._tickets: dict[ChunkId, int] = {}
        self._heap: list[tuple[float, int, ChunkId]] = []
        self._num_tickets = 0

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._ranks

    def __len__(self) -> int:
        return len(self._ranks)

    def insert(self, chunk: ChunkId, rank: float) -> None:
        """Add a chunk; one that is there already stays as it is."""
        if chunk in self._ranks:
            return
        # Also the order among equals: who came first is found first.
        self._num_tickets += 1
        self._ranks[chunk] = rank
        self._tickets[chunk] = self._num_tickets
        if len(self._heap) > 2 * len(self._ranks) + _SPARE:
            self._heap = [(self._ranks[each], self._tickets[each], each) for each in self._ranks]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (rank, self._num_tickets, chunk))

    def rank(self, chunk: ChunkId) -> float:
        """Return the rank of a chunk; raises KeyError if it is not there."""
        return self._ranks[chunk]

    def raise_to(self, chunk: ChunkId, rank: float) -> None:
        """Give a chunk a rank at least as high as the one it has."""
        assert rank >= self._ranks[chunk], f"chunk {chunk} falls from {self._ranks[chunk]}"
        self._ranks[chunk] = rank

    def remove(self, chunk: ChunkId) -> float | None:
        """Forget a chunk and return its rank; None if it is not there."""
        self._tickets.pop(chunk, None)
        return self._ranks.pop(chunk, None)

    def lowest(self, n: int, exclude: Collection[ChunkId] = ()) -> list[ChunkId]:
        """Return up to ``n`` chunks with the lowest ranks, lowest first."""
        found: list[ChunkId] = []
        seen: list[tuple[float, int, ChunkId]] = []
        while self._heap and len(found) < n:
            entry = heapq.heappop(self._heap)
            rank, ticket, chunk = entry
            if self._tickets.get(chunk) != ticket:
                continue
            if self._ranks[chunk] > rank:
                heapq.heappush(self._heap, (self._ranks[chunk], ticket, chunk))
                continue
            seen.append(entry)
            if chunk not in exclude:
                found.append(chunk)
        for entry in seen:
            heapq.heappush(self._heap, entry)
        return found
