"""Any sequence of calls on the cache of lines, against dictionaries."""

import ctypes
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from offload.prefetch.line_cache import WAYS, LineCache

ROW_BYTES = 16
RUN = 8
"""Keys of one chunk."""
KEYS = st.lists(st.integers(0, 20 * RUN - 1), max_size=40)


def row_of(key: int) -> bytes:
    """Return what the row of a key holds, wherever it is."""
    return key.to_bytes(8, "little") + (key * 2654435761 % 2**64).to_bytes(8, "little")


def as_array(keys: list[int]) -> NDArray[np.int64]:
    return np.array(keys, dtype=np.int64)


class LineCacheMachine(RuleBasedStateMachine):
    """Holds which keys may be found, and when each was used last."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 0
        self.last_use: dict[int, int] = {}

    @initialize(num_sets=st.integers(0, 5))
    def open(self, num_sets: int) -> None:
        self.num_lines = num_sets * WAYS
        self.cache = LineCache(np.zeros((self.num_lines, ROW_BYTES), dtype=np.uint8))

    def find(self, keys: list[int]) -> set[int]:
        """Return the keys that are found; each row found is the right one."""
        addresses = self.cache.find(as_array(keys)).tolist()
        found = {key for key, address in zip(keys, addresses, strict=True) if address}
        for key, address in zip(keys, addresses, strict=True):
            assert bool(address) == (key in found), "a repeated key was found once only"
            assert not address or ctypes.string_at(address, ROW_BYTES) == row_of(key)
        return found

    @rule()
    def tick(self) -> None:
        self.time += 1
        self.cache.tick()

    @rule(keys=KEYS)
    def look_up(self, keys: list[int]) -> None:
        expected = {key for key in keys if key in self.last_use}
        assert self.find(keys) == expected
        self.last_use |= dict.fromkeys(expected, self.time)

    @rule(keys=KEYS)
    def insert(self, keys: list[int]) -> None:
        rows = np.frombuffer(b"".join(map(row_of, keys)), dtype=np.uint8).reshape(-1, ROW_BYTES)
        self.cache.insert(as_array(keys), rows)
        for key in keys:
            if key in self.last_use:
                self.last_use[key] = self.time
        before, after = self.by_set(self.last_use), self.by_set(self.resident())
        new = self.by_set(set(keys) - self.last_use.keys())
        for number in before.keys() | new.keys() if self.num_lines else set():
            self.check_set(before[number], new[number], after[number])
        self.last_use = {key: self.last_use.get(key, self.time) for key in self.resident()}

    def check_set(self, before: set[int], new: set[int], after: set[int]) -> None:
        """Newcomers are in, and those had to go that were not used for the longest time."""
        assert after <= before | new
        assert len(after) == min(WAYS, len(before | new))
        assert len(after & new) == min(WAYS, len(new))
        stayed = [self.last_use[key] for key in before & after]
        assert all(self.last_use[key] <= min(stayed, default=self.time) for key in before - after)

    def by_set(self, keys: Iterable[int]) -> defaultdict[int, set[int]]:
        parts = defaultdict[int, set[int]](set)
        ordered = sorted(keys)
        for key, number in zip(ordered, self.cache._sets(as_array(ordered)).tolist(), strict=True):
            parts[number].add(key)
        return parts

    @rule(chunks=st.lists(st.integers(0, 19), max_size=20, unique=True))
    def drop(self, chunks: list[int]) -> None:
        self.cache.drop(as_array(chunks) * RUN, RUN)
        self.last_use = {key: t for key, t in self.last_use.items() if key // RUN not in chunks}

    def resident(self) -> set[int]:
        """Return the keys in the cache, without counting as a use of them."""
        keys = self.cache._keys
        return set(keys[keys >= 0].tolist())

    @invariant()
    def holds_what_it_should(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity()
            assert self.resident() == self.last_use.keys()
            assert self.cache.num_used == len(self.last_use) <= self.cache.num_lines


TestLineCacheMachine = LineCacheMachine.TestCase
