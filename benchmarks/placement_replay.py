"""What a placement policy would have found where: traces of attention, replayed against tiers."""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean

import torch
from torch import Tensor

from offload.tiers.eviction import EvictionPolicy
from offload.tiers.eviction_admission import SecondHit
from offload.types import ChunkId

DEVICE, HOST, DISK = range(3)


@dataclass(frozen=True)
class Trace:
    """Attention of successive steps; chunks are numbered layer by layer.

    ``masses`` is ``[num_steps, num_layers, num_chunks]``, the share of a layer's attention; what a
    step reads are the ``num_read`` chunks of each layer that get most.
    """

    masses: Tensor
    num_read: int

    @property
    def num_steps(self) -> int:
        return self.masses.shape[0]

    @property
    def num_layers(self) -> int:
        return self.masses.shape[1]

    @property
    def num_chunks(self) -> int:
        """Of all layers."""
        return self.num_layers * self.masses.shape[2]

    def layer_of(self, chunk: ChunkId) -> int:
        return chunk // self.masses.shape[2]

    def read(self, step: int) -> list[ChunkId]:
        """Return what a step reads, of each layer the chunks that get most first."""
        found = self.masses[step].topk(self.num_read, dim=1).indices
        first = torch.arange(self.num_layers).unsqueeze(1) * self.masses.shape[2]
        return [ChunkId(chunk) for chunk in (found + first).flatten().tolist()]


@dataclass(frozen=True)
class Tally:
    """What was found where, after the warm-up.

    ``device`` and ``host`` are shares of the chunks read, ``mass`` is the share of all attention
    that went to chunks in memory, the other two are chunks per step.
    """

    device: float
    host: float
    disk_chunks: float
    mass: float
    moved_chunks: float


class Farthest:
    """Belady's optimum: the chunk goes that is needed again last. Knows the future."""

    def __init__(self, trace: Trace) -> None:
        self._uses: dict[ChunkId, list[int]] = {}
        for step in range(trace.num_steps):
            for chunk in trace.read(step):
                self._uses.setdefault(chunk, []).append(step)
        self._never = trace.num_steps
        self._step = -1
        self._residents: set[ChunkId] = set()

    def insert(self, chunk: ChunkId) -> None:
        self._residents.add(chunk)

    def touch(self, chunks: Iterable[ChunkId]) -> None:
        return

    def observe(self, masses: Mapping[ChunkId, float]) -> None:
        self._step += 1

    def remove(self, chunk: ChunkId) -> None:
        self._residents.discard(chunk)

    def victims(self, n: int, exclude: Collection[ChunkId] = ()) -> list[ChunkId]:
        candidates = sorted(self._residents.difference(exclude))
        return sorted(candidates, key=self._next_use, reverse=True)[:n]

    def _next_use(self, chunk: ChunkId) -> int:
        uses = self._uses.get(chunk, [])
        position = bisect_right(uses, self._step)
        return uses[position] if position < len(uses) else self._never


def mean_tally(tallies: Sequence[Tally]) -> Tally:
    """Return the mean of every figure."""
    rows = zip(*map(astuple, tallies), strict=True)
    return Tally(*map(fmean, rows))


class Tiers:
    """Which tier each chunk is in; what is read comes up if the policies find it worth its room.

    A newcomer is inserted before the policy is asked who goes, so it may be the one that does not
    come up at all: a policy that knows what is worth more is not made to fetch what is worth less.
    """

    def __init__(
        self,
        num_chunks: int,
        capacities: Sequence[int],
        make_policy: Callable[[], EvictionPolicy],
        admission: SecondHit | None = None,
    ) -> None:
        self.capacities = list(capacities)
        self.policies = [make_policy() for _ in self.capacities]
        self._admission = SecondHit(0) if admission is None else admission
        self.level = dict.fromkeys(map(ChunkId, range(num_chunks)), DISK)
        # The latest chunks are the ones that were still in memory when the prompt ended.
        newest = iter(sorted(self.level, reverse=True))
        for level, (policy, room) in enumerate(zip(self.policies, self.capacities, strict=True)):
            for _, chunk in zip(range(room), newest, strict=False):
                self.level[chunk] = level
                policy.insert(chunk)

    def step(self, read: Sequence[ChunkId], masses: Mapping[ChunkId, float]) -> int:
        """Let what was read come up; return how many chunks changed place."""
        before = dict(self.level)
        for policy in self.policies:
            policy.touch(read)
            policy.observe(masses)
        admitted = self._admission.admit(chunk for chunk in read if self.level[chunk] != DEVICE)
        demoted = self._admit(DEVICE, admitted)
        still_below = [chunk for chunk in admitted if self.level[chunk] == DISK]
        self._admit(HOST, [*demoted, *still_below])
        return sum(self.level[chunk] != level for chunk, level in before.items())

    def _admit(self, level: int, newcomers: Sequence[ChunkId]) -> list[ChunkId]:
        """Let chunks into a tier as far as its policy keeps them; return those that made room."""
        policy = self.policies[level]
        num_held = sum(at == level for at in self.level.values())
        for chunk in newcomers:
            policy.insert(chunk)
        overflow = num_held + len(newcomers) - self.capacities[level]
        leaving = set(policy.victims(max(0, overflow)))
        for chunk in leaving:
            policy.remove(chunk)
        for chunk in newcomers:
            if chunk not in leaving:
                if self.level[chunk] == HOST:
                    self.policies[HOST].remove(chunk)
                self.level[chunk] = level
        demoted = sorted(leaving.difference(newcomers))
        for chunk in demoted:
            self.level[chunk] = DISK
        return demoted


def replay(
    trace: Trace, tiers: Tiers, num_skipped: int, at_skipped: Callable[[Tiers], None] | None = None
) -> Tally:
    """Run a trace; the first steps are not counted, and ``at_skipped`` is called after them.

    Policies learn the masses of what is read, as they would where nothing else is computed.
    """
    found = [0, 0, 0]
    moved, mass_found, mass = 0, 0.0, 0.0
    for step in range(trace.num_steps):
        if step == num_skipped and at_skipped is not None:
            at_skipped(tiers)
        read = trace.read(step)
        masses = trace.masses[step].flatten()
        if step >= num_skipped:
            for chunk in read:
                found[tiers.level[chunk]] += 1
            in_memory = [chunk for chunk, level in tiers.level.items() if level < DISK]
            mass_found += float(masses[in_memory].sum())
            mass += float(masses.sum())
        observed = dict(zip(read, masses[read].tolist(), strict=True))
        changes = tiers.step(read, observed)
        moved += changes if step >= num_skipped else 0
    num_steps, num_read = trace.num_steps - num_skipped, sum(found)
    return Tally(
        device=found[DEVICE] / num_read,
        host=found[HOST] / num_read,
        disk_chunks=found[DISK] / num_steps,
        mass=mass_found / mass,
        moved_chunks=moved / num_steps,
    )
