"""Which chunk on the disk should change places with which chunk in memory. Moves nothing."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import nlargest
from typing import Final, NamedTuple

from offload.store import ChunkStore
from offload.tiers.eviction import Ranking
from offload.types import ChunkId

_MARGIN: Final = 16
"""A newcomer is worth no less than one in so many of a tier's chunks."""

_REST: Final = 4
"""Rounds in which a chunk that has moved, or could not, stays where it is."""


class Match(NamedTuple):
    """A chunk that should come up to a level, and who makes room for it; None: there is room."""

    level: int
    newcomer: ChunkId
    leaver: ChunkId | None

    @property
    def chunks(self) -> list[ChunkId]:
        """Both, or the one."""
        return [self.newcomer] if self.leaver is None else [self.newcomer, self.leaver]


class ExchangeChoice:
    """Ranks the chunks of the memory tiers against those that were read from the disk.

    So that chunks do not go to and fro, a newcomer has to be worth more than the one that leaves
    and no less than a sixteenth of the tier, and whoever has moved rests for some rounds.

    Only the thread that holds the engine's lock calls methods.

    Parameters
    ----------
    store : ChunkStore
        Is looked at only.
    rankings : mapping of int to Ranking
        By level, of memory tiers. They follow the chunks that move by themselves.
    """

    def __init__(self, store: ChunkStore, rankings: Mapping[int, Ranking]) -> None:
        self._store = store
        self._bottom = len(store.tiers) - 1
        self._rankings = dict(sorted(rankings.items()))
        self._moved: set[ChunkId] = set(store.table)
        self._rests_until: dict[ChunkId, int] = {}
        self._round = 0
        store.watch(self._moved.add)

    def observe(self, masses: Mapping[ChunkId, float]) -> None:
        """Begin a round: take note of the attention that living chunks got."""
        self._round += 1
        rests = self._rests_until.items()
        self._rests_until = {chunk: until for chunk, until in rests if until > self._round}
        self._follow_moves()
        for ranking in self._rankings.values():
            ranking.touch(masses)
            ranking.observe(masses)

    def rest(self, chunks: Iterable[ChunkId]) -> None:
        """Let chunks be where they are for some rounds."""
        self._rests_until |= dict.fromkeys(chunks, self._round + _REST)

    def choose(
        self, masses: Mapping[ChunkId, float], most: int, busy: Sequence[Match] = ()
    ) -> list[Match]:
        """Return who should change places, those with most attention first in each tier.

        Parameters
        ----------
        masses : mapping of ChunkId to float
            Of living chunks; those of them that lie on the disk only may come up.
        most : int
            Matches, at most.
        busy : sequence of Match
            That have been chosen and have not taken place.
        """
        excluded = {chunk for match in busy for chunk in match.chunks} | self._rests_until.keys()
        below = (chunk for chunk in masses if chunk not in excluded and self._is_below(chunk))
        newcomers = nlargest(most, below, key=masses.__getitem__)
        excluded |= self._store.table.protected
        chosen: list[Match] = []
        for level in self._rankings:
            claimed = sum(match.level == level and match.leaver is None for match in busy)
            room = max(0, self._store.tiers[level].num_free - claimed)
            chosen += (Match(level, chunk, None) for chunk in newcomers[:room])
            chosen += self._contest(level, newcomers[room:], excluded)
            served = {match.newcomer for match in chosen}
            newcomers = [chunk for chunk in newcomers if chunk not in served]
        return chosen

    def _contest(
        self, level: int, newcomers: Sequence[ChunkId], excluded: Collection[ChunkId]
    ) -> list[Match]:
        """Return which newcomers are worth more than whom, by a margin."""
        tier, ranking = self._store.tiers[level], self._rankings[level]
        margin = (tier.num_slots - tier.num_free) // _MARGIN
        least = ranking.victims(len(newcomers) + margin, excluded)
        ranked = sorted(newcomers, key=ranking.worth, reverse=True)
        return [
            Match(level, newcomer, leaver)
            for newcomer, leaver, other in zip(ranked, least, least[margin:], strict=False)
            if ranking.worth(leaver) < ranking.worth(newcomer) >= ranking.worth(other)
        ]

    def _is_below(self, chunk: ChunkId) -> bool:
        """Whether a chunk lies on the disk only."""
        return self._store.table[chunk].slots.keys() == {self._bottom}

    def _follow_moves(self) -> None:
        """Tell the rankings which chunks came and went since the last round."""
        table = self._store.table
        for chunk in self._moved:
            held: Collection[int] = table[chunk].slots if chunk in table else ()
            for level, ranking in self._rankings.items():
                if level in held:
                    ranking.insert(chunk)
                else:
                    ranking.remove(chunk)
        self._moved.clear()
