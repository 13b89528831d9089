"""Both eviction policies keep the contract."""

from offload.tiers.eviction import EvictionPolicy, KeepFirst, LeastRecentlyUsed
from tests.contracts.eviction_contract import EvictionContract


class TestKeepFirst(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return KeepFirst()


class TestLeastRecentlyUsed(EvictionContract):
    def make_policy(self) -> EvictionPolicy:
        return LeastRecentlyUsed()
