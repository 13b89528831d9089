"""Every eviction policy keeps the contract."""

from offload.tiers.eviction import EvictionPolicy, KeepFirst, LeastRecentlyUsed
from offload.tiers.eviction_cumulative import LeastCumulativeMass
from offload.tiers.eviction_layers import ByLayer
from offload.tiers.eviction_mass import LeastMass
from offload.tiers.eviction_recurrence import LongestOverdue
from tests.contracts.eviction_contract import EvictionContract


class TestKeepFirst(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return KeepFirst()


class TestLeastRecentlyUsed(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return LeastRecentlyUsed()


class TestLeastMass(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return LeastMass()


class TestLeastMassThatRemembersNothing(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return LeastMass(num_ghosts=0)


class TestLeastCumulativeMass(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return LeastCumulativeMass()


class TestLongestOverdue(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return LongestOverdue()


class TestLeastRecentlyUsedByLayer(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return ByLayer(LeastRecentlyUsed, lambda chunk: chunk % 2)


class TestLeastMassByLayerWithShares(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return ByLayer(LeastMass, lambda chunk: chunk % 3, shares=[0.5, 0.5])
