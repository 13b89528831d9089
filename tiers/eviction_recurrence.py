"""The chunk that is longest overdue goes first, measured by its own rhythm."""

import heapq
import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from offload.errors import ConfigError
from offload.tiers.eviction_ghosts import DEFAULT_GHOSTS, Ghosts
from offload.types import ChunkId


class _Rhythm(NamedTuple):
    """When a chunk last got much attention, and its longest time between two such steps."""

    last_step: int
    longest: int

    def beat(self, step: int) -> "_Rhythm":
        return _Rhythm(step, max(self.longest, step - self.last_step))


class LongestOverdue:
    """Ranks chunks by how long they got little attention, over the longest time they ever did.

    A chunk whose attention has come back after at most m steps is expected back within m steps; one
    that is idle for longer is overdue and goes before all that are not, and the more overdue the
    sooner. The first arrival counts as attention; a chunk that has had none since is expected in
    the next step. What is known of a chunk is remembered while it is in another tier.

    Like the other policies not thread-safe. ``observe`` takes constant time for each mass.
    ``victims`` looks at every chunk of the tier, a quarter of a microsecond each: who needs several
    had better ask for them at once.

    Parameters
    ----------
    high : float
        Much is so many times the mean of the masses in the same step. Where only what is read is
        observed, 1 takes half of it for idle, and finds far less in memory.
    num_ghosts : int
        Chunks of other tiers that are remembered.

    Raises
    ------
    ConfigError
        ``high`` is not positive and finite.

    Notes
    -----
    LazyEviction (arXiv:2506.15969), over chunks instead of tokens. There, an observation window
    delays evictions; a full tier cannot wait. Its threshold is a constant; here it follows the
    mean, as chunks get less each the more there are.
    """

    def __init__(self, high: float = 0.5, num_ghosts: int = DEFAULT_GHOSTS) -> None:
        if not 0 < high < math.inf:
            raise ConfigError(f"attention of {high} times the mean is not a threshold")
        self._high = high
        self._step = 0
        self._rhythms: dict[ChunkId, _Rhythm] = {}
        self._ghosts: Ghosts[_Rhythm] = Ghosts(num_ghosts)

    def insert(self, chunk: ChunkId) -> None:
        """Note that a chunk now lives in the tier."""
        if chunk not in self._rhythms:
            self._rhythms[chunk] = self._ghosts.take(chunk) or _Rhythm(self._step, 0)

    def touch(self, chunks: Iterable[ChunkId]) -> None:
        """Note nothing: what was read shows in the attention."""
        return

    def observe(self, masses: Mapping[ChunkId, float]) -> None:
        """Note how much attention chunks got in one step, those of other tiers included."""
        self._step += 1
        if not masses:
            return
        threshold = self._high * math.fsum(masses.values()) / len(masses)
        for chunk, mass in masses.items():
            if not (mass >= threshold and mass > 0):
                continue
            if chunk in self._rhythms:
                self._rhythms[chunk] = self._rhythms[chunk].beat(self._step)
            else:
                known = self._ghosts.get(chunk) or _Rhythm(self._step, 0)
                self._ghosts.put(chunk, known.beat(self._step))

    def remove(self, chunk: ChunkId) -> None:
        """Note that a chunk left; its rhythm is remembered."""
        rhythm = self._rhythms.pop(chunk, None)
        if rhythm is not None:
            self._ghosts.put(chunk, rhythm)

    def victims(self, n: int, exclude: Collection[ChunkId] = ()) -> list[ChunkId]:
        """Return up to ``n`` chunks to move out, first to go first."""
        candidates = (chunk for chunk in self._rhythms if chunk not in exclude)
        return heapq.nlargest(n, candidates, key=self._overdue)

    def worth(self, chunk: ChunkId) -> float:
        """Return how little overdue a chunk is, 0 at best; see ``Ranking``."""
        return -self._overdue(chunk)

    def _overdue(self, chunk: ChunkId) -> float:
        rhythm = self._rhythms.get(chunk) or self._ghosts.get(chunk) or _Rhythm(self._step, 0)
        return (self._step - rhythm.last_step) / max(rhythm.longest, 1)
