"""Any sequence of calls on the policies that rank by attention, against plain dictionaries."""

from abc import abstractmethod
from itertools import pairwise

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from offload.tiers.eviction import EvictionPolicy, LeastRecentlyUsed
from offload.tiers.eviction_cumulative import LeastCumulativeMass
from offload.tiers.eviction_mass import LeastMass
from offload.tiers.eviction_recurrence import LongestOverdue
from offload.types import ChunkId

CHUNKS = st.integers(0, 11).map(ChunkId)
MASSES = st.dictionaries(CHUNKS, st.sampled_from([0.0, 1e-6, 0.01, 0.1, 0.25, 1.0]))


class PolicyMachine(RuleBasedStateMachine):
    """Holds who is resident, in the order of arrival; subclasses know who is worth what."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = self.make_policy()
        self.residents: list[ChunkId] = []
        self.step = 0

    @abstractmethod
    def make_policy(self) -> EvictionPolicy:
        """Return a new policy."""

    @abstractmethod
    def worth(self, chunk: ChunkId) -> float:
        """Return what keeps a resident from being evicted."""

    def arrive(self, chunk: ChunkId) -> None:
        """Note a new resident."""

    def note(self, masses: dict[ChunkId, float]) -> None:
        """Note attention."""

    def note_read(self, chunk: ChunkId) -> None:
        """Note a read of a resident."""

    @rule(chunk=CHUNKS)
    def insert(self, chunk: ChunkId) -> None:
        if chunk not in self.residents:
            self.arrive(chunk)
            self.residents.append(chunk)
        self.policy.insert(chunk)

    @rule(chunk=CHUNKS)
    def remove(self, chunk: ChunkId) -> None:
        if chunk in self.residents:
            self.residents.remove(chunk)
        self.policy.remove(chunk)

    @rule(masses=MASSES, times=st.integers(1, 3))
    def observe(self, masses: dict[ChunkId, float], times: int) -> None:
        for _ in range(times):
            self.step += 1
            self.note(masses)
            self.policy.observe(masses)

    @rule(chunks=st.lists(CHUNKS, max_size=4))
    def touch(self, chunks: list[ChunkId]) -> None:
        for chunk in chunks:
            if chunk in self.residents:
                self.note_read(chunk)
        self.policy.touch(chunks)

    @rule(n=st.integers(0, 12), exclude=st.sets(CHUNKS, max_size=4))
    def find_victims(self, n: int, exclude: set[ChunkId]) -> None:
        victims = self.policy.victims(n, exclude)
        candidates = [chunk for chunk in self.residents if chunk not in exclude]
        assert len(victims) == len(set(victims)) == min(n, len(candidates))
        assert set(victims) <= set(candidates)
        worths = [self.worth(chunk) for chunk in victims]
        spared = [self.worth(chunk) for chunk in candidates if chunk not in victims]
        order = [*worths, min(spared)] if spared else worths
        # Sums of the same numbers in another order may differ in the last digits.
        assert all(b >= a - 1e-9 * abs(a) for a, b in pairwise(order))

    @invariant()
    def evicts_everybody_in_the_end(self) -> None:
        assert set(self.policy.victims(99)) == set(self.residents)


class LeastRecentlyUsedMachine(PolicyMachine):
    """The most recently read is worth most."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[ChunkId, int] = {}
        self.time = 0

    def make_policy(self) -> EvictionPolicy:
        return LeastRecentlyUsed()

    def worth(self, chunk: ChunkId) -> float:
        return self.last[chunk]

    def arrive(self, chunk: ChunkId) -> None:
        self.note_read(chunk)

    def note_read(self, chunk: ChunkId) -> None:
        self.time += 1
        self.last[chunk] = self.time


class LeastMassMachine(PolicyMachine):
    """Averages as they are defined: every chunk fades at every step."""

    decay = 0.75

    def __init__(self) -> None:
        super().__init__()
        self.averages: dict[ChunkId, float] = {}
        self.typical = 0.0

    def make_policy(self) -> EvictionPolicy:
        return LeastMass(self.decay)

    def worth(self, chunk: ChunkId) -> float:
        return self.averages[chunk]

    def arrive(self, chunk: ChunkId) -> None:
        self.averages.setdefault(chunk, self.typical)

    def note(self, masses: dict[ChunkId, float]) -> None:
        self.averages = {chunk: self.decay * mean for chunk, mean in self.averages.items()}
        if sum(masses.values()) > 0:
            self.typical = sum(masses.values()) / len(masses)
        for chunk, mass in masses.items():
            if mass > 0:
                old = self.averages.get(chunk, 0.0)
                self.averages[chunk] = old + (1 - self.decay) * mass


class LeastCumulativeMassMachine(LeastMassMachine):
    """Sums, in which a newcomer begins with the mean of the latest masses."""

    def make_policy(self) -> EvictionPolicy:
        return LeastCumulativeMass()

    def note(self, masses: dict[ChunkId, float]) -> None:
        if sum(masses.values()) > 0:
            self.typical = sum(masses.values()) / len(masses)
        for chunk, mass in masses.items():
            if mass > 0:
                self.averages[chunk] = self.averages.get(chunk, 0.0) + mass


class LongestOverdueMachine(PolicyMachine):
    """All steps at which a chunk got much, or came as a stranger."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[ChunkId, list[int]] = {}

    def make_policy(self) -> EvictionPolicy:
        return LongestOverdue(high=1.0)

    def worth(self, chunk: ChunkId) -> float:
        steps = self.steps[chunk]
        rests = [later - earlier for earlier, later in pairwise(steps)]
        return -(self.step - steps[-1]) / max([1, *rests])

    def arrive(self, chunk: ChunkId) -> None:
        self.steps.setdefault(chunk, [self.step])

    def note(self, masses: dict[ChunkId, float]) -> None:
        mean = sum(masses.values()) / max(1, len(masses))
        for chunk, mass in masses.items():
            if mass >= mean and mass > 0:
                self.steps.setdefault(chunk, []).append(self.step)


TestLeastRecentlyUsed = LeastRecentlyUsedMachine.TestCase
TestLeastMass = LeastMassMachine.TestCase
TestLeastCumulativeMass = LeastCumulativeMassMachine.TestCase
TestLongestOverdue = LongestOverdueMachine.TestCase
