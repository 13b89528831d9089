"""What every eviction policy must do. Not collected itself: subclass it as ``Test…``."""

from abc import ABC, abstractmethod

import pytest

from offload.tiers.eviction import EvictionPolicy, Ranking
from offload.types import ChunkId


def ids(*numbers: int) -> list[ChunkId]:
    return [ChunkId(number) for number in numbers]


class EvictionContract(ABC):
    """Subclass, and say how to make the policy."""

    @abstractmethod
    def make_policy(self) -> EvictionPolicy:
        """Return a new policy."""

    @pytest.fixture
    def policy(self) -> EvictionPolicy:
        return self.make_policy()

    @pytest.fixture
    def filled(self, policy: EvictionPolicy) -> EvictionPolicy:
        """A policy with the chunks 0 to 4, inserted in this order."""
        for chunk in ids(0, 1, 2, 3, 4):
            policy.insert(chunk)
        return policy

    def test_policy_of_nothing_has_no_victims(self, policy: EvictionPolicy) -> None:
        assert policy.victims(3) == []

    @pytest.mark.parametrize("n", [0, 1, 3, 5, 9])
    def test_victims_are_distinct_residents_and_at_most_as_many_as_asked(
        self, filled: EvictionPolicy, n: int
    ) -> None:
        victims = filled.victims(n)
        assert len(victims) <= n
        assert len(set(victims)) == len(victims)
        assert set(victims) <= set(ids(0, 1, 2, 3, 4))

    def test_victims_never_include_excluded_chunks(self, filled: EvictionPolicy) -> None:
        assert not set(filled.victims(5, exclude=set(ids(0, 2, 4)))) & set(ids(0, 2, 4))

    def test_victims_never_include_removed_chunks(self, filled: EvictionPolicy) -> None:
        for chunk in ids(0, 1):
            filled.remove(chunk)
        assert not set(filled.victims(5)) & set(ids(0, 1))

    def test_asking_for_victims_changes_nothing(self, filled: EvictionPolicy) -> None:
        assert filled.victims(3) == filled.victims(3)

    def test_touch_of_unknown_chunks_does_not_make_them_residents(
        self, policy: EvictionPolicy
    ) -> None:
        policy.touch(ids(7, 8))
        assert policy.victims(2) == []

    def test_remove_of_an_unknown_chunk_is_ignored(self, filled: EvictionPolicy) -> None:
        before = filled.victims(5)
        filled.remove(ChunkId(99))
        assert filled.victims(5) == before

    def test_victims_are_none_where_all_are_excluded(self, filled: EvictionPolicy) -> None:
        assert filled.victims(5, exclude=set(ids(0, 1, 2, 3, 4))) == []

    def test_chunk_that_is_inserted_again_is_one_chunk(self, filled: EvictionPolicy) -> None:
        before = filled.victims(9)
        filled.insert(ChunkId(3))
        assert filled.victims(9) == before

    def test_chunk_that_left_and_came_back_is_one_chunk(self, filled: EvictionPolicy) -> None:
        filled.remove(ChunkId(3))
        filled.insert(ChunkId(3))
        victims = filled.victims(9)
        assert len(set(victims)) == len(victims)
        assert set(victims) <= set(ids(0, 1, 2, 3, 4))

    def test_attention_to_unknown_chunks_does_not_make_them_residents(
        self, policy: EvictionPolicy
    ) -> None:
        policy.observe(dict.fromkeys(ids(7, 8), 0.5))
        assert policy.victims(2) == []

    @pytest.mark.parametrize("masses", [{}, {0: 0.0}, {0: 0.7, 4: 0.2, 9: 0.1}], ids=str)
    def test_attention_changes_no_more_than_the_order(
        self, filled: EvictionPolicy, masses: dict[int, float]
    ) -> None:
        before = filled.victims(9)
        for _ in range(3):
            filled.observe({ChunkId(chunk): mass for chunk, mass in masses.items()})
        assert set(filled.victims(9)) == set(before)
        assert filled.victims(9) == filled.victims(9)

    @pytest.mark.parametrize("n", [1, 2, 4])
    def test_fewer_victims_are_the_first_of_more(self, filled: EvictionPolicy, n: int) -> None:
        filled.touch(ids(1, 3))
        filled.observe({ChunkId(0): 0.6, ChunkId(2): 0.3})
        assert filled.victims(n) == filled.victims(5)[:n]


class RankingContract(EvictionContract):
    """What every policy must do besides that compares chunks with those of other tiers."""

    @abstractmethod
    def make_policy(self) -> Ranking:
        """Return a new policy."""

    @pytest.fixture
    def ranking(self) -> Ranking:
        """A policy with the chunks 0 to 4, which got attention, and so did 7."""
        ranking = self.make_policy()
        for chunk in ids(0, 1, 2, 3, 4):
            ranking.insert(chunk)
        for chunk, mass in zip(ids(3, 0, 4, 1, 2, 7), (0.1, 0.3, 0.2, 0.5, 0.4, 0.35), strict=True):
            ranking.touch([chunk])
            ranking.observe({chunk: mass})
        return ranking

    def test_victims_are_worth_no_more_than_those_that_go_later(self, ranking: Ranking) -> None:
        worth = [ranking.worth(chunk) for chunk in ranking.victims(5)]
        assert worth == sorted(worth)
        assert worth[0] < worth[-1]

    @pytest.mark.parametrize("number", [7, 8])
    def test_chunk_outside_is_worth_what_it_is_worth_once_it_came_in(
        self, ranking: Ranking, number: int
    ) -> None:
        [chunk] = ids(number)
        outside = ranking.worth(chunk)
        ranking.insert(chunk)
        assert ranking.worth(chunk) == outside

    def test_asking_for_worth_changes_nothing(self, ranking: Ranking) -> None:
        before = ranking.victims(5)
        for number in range(9):
            ranking.worth(ChunkId(number))
        assert ranking.victims(9) == before
