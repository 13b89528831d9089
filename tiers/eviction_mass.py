"""The chunk with the least attention of late goes first."""

import math
from collections.abc import Collection, Iterable, Mapping

from offload.errors import ConfigError
from offload.tiers.eviction_ghosts import DEFAULT_GHOSTS, Ghosts
from offload.tiers.eviction_ranks import RisingRanks
from offload.types import ChunkId


class LeastMass:
    """Ranks chunks by a moving average of the attention they get; reads as such count nothing.

    The average is ``s ← decay · s + (1 − decay) · mass`` at every step. All chunks fade alike, so
    instead of letting each fade the weight of later steps grows, and a rank, the logarithm of
    ``Σ mass(t) · decay^−t``, only ever rises. What a chunk got is remembered while it is in another
    tier. One of which nothing is known ranks as if it had got the mean of the latest masses all
    along, and fades from there.

    Like the other policies not thread-safe. ``observe`` takes a dictionary access or two for each
    mass.

    Parameters
    ----------
    decay : float
        Over 0, at most 1. With 0.8 half is forgotten after 3 steps; measured in
        ``benchmarks/placement.py``, less finds little more and moves more, 0.9 finds less.
    num_ghosts : int
        Chunks of other tiers that are remembered.

    Raises
    ------
    ConfigError
        ``decay`` is out of its range.

    Notes
    -----
    LeoAM (arXiv:2506.20187) places chunks by importance; which measure of it, over which time,
    could not be read and is ours.
    """

    def __init__(self, decay: float = 0.8, num_ghosts: int = DEFAULT_GHOSTS) -> None:
        if not 0 < decay <= 1:
            raise ConfigError(f"a decay of {decay} is not over 0 and at most 1")
        self._growth = -math.log(decay)
        self._long_run = -math.log(1 - decay) if decay < 1 else 0.0
        self._step = 0
        self._typical = -math.inf
        self._ranks = RisingRanks()
        self._ghosts: Ghosts[float] = Ghosts(num_ghosts)

    def insert(self, chunk: ChunkId) -> None:
        """Note that a chunk now lives in the tier."""
        known = self._ghosts.take(chunk)
        self._ranks.insert(chunk, self._newcomer() if known is None else known)

    def touch(self, chunks: Iterable[ChunkId]) -> None:
        """Note nothing: what was read shows in the attention."""
        return

    def observe(self, masses: Mapping[ChunkId, float]) -> None:
        """Note how much attention chunks got in one step, those of other tiers included."""
        self._step += 1
        weight = self._step * self._growth
        total = math.fsum(masses.values())
        if total > 0:
            self._typical = math.log(total / len(masses))
        for chunk, mass in masses.items():
            if mass <= 0:
                continue
            gain = math.log(mass) + weight
            if chunk in self._ranks:
                self._ranks.raise_to(chunk, _log_add(self._ranks.rank(chunk), gain))
            else:
                known = self._ghosts.get(chunk)
                self._ghosts.put(chunk, gain if known is None else _log_add(known, gain))

    def remove(self, chunk: ChunkId) -> None:
        """Note that a chunk left; what it got is remembered."""
        rank = self._ranks.remove(chunk)
        if rank is not None:
            self._ghosts.put(chunk, rank)

    def victims(self, n: int, exclude: Collection[ChunkId] = ()) -> list[ChunkId]:
        """Return up to ``n`` chunks to move out, first to go first."""
        return self._ranks.lowest(n, exclude)

    def worth(self, chunk: ChunkId) -> float:
        """Return the rank of a chunk, see ``Ranking``."""
        if chunk in self._ranks:
            return self._ranks.rank(chunk)
        known = self._ghosts.get(chunk)
        return self._newcomer() if known is None else known

    def _newcomer(self) -> float:
        return self._typical + self._long_run + self._step * self._growth


def _log_add(one: float, other: float) -> float:
    """Return ``log(exp(one) + exp(other))``, of which ``other`` is finite."""
    high, low = max(one, other), min(one, other)
    return high + math.log1p(math.exp(low - high))
