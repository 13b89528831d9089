"""Every eviction policy keeps the contract."""

from offload.tiers.eviction import EvictionPolicy, KeepFirst, LeastRecentlyUsed, Ranking
from offload.tiers.eviction_cumulative import LeastCumulativeMass
from offload.tiers.eviction_layers import ByLayer
from offload.tiers.eviction_mass import LeastMass
from offload.tiers.eviction_recurrence import LongestOverdue
from tests.contracts.eviction_contract import EvictionContract, RankingContract


class TestKeepFirst(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return KeepFirst()


class TestLeastRecentlyUsed(RankingContract):
    def make_policy(self) -> Ranking:
        return LeastRecentlyUsed()


class TestLeastMass(RankingContract):
    def make_policy(self) -> Ranking:
        return LeastMass()


class TestLeastMassThatRemembersNothing(RankingContract):
    def make_policy(self) -> Ranking:
        return LeastMass(num_ghosts=0)


class TestLeastCumulativeMass(RankingContract):
    def make_policy(self) -> Ranking:
        return LeastCumulativeMass()


class TestLongestOverdue(RankingContract):
    def make_policy(self) -> Ranking:
        return LongestOverdue()


class TestLeastRecentlyUsedByLayer(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return ByLayer(LeastRecentlyUsed, lambda chunk: chunk % 2)


class TestLeastMassByLayerWithShares(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return ByLayer(LeastMass, lambda chunk: chunk % 3, shares=[0.5, 0.5])
