"""Rounds of a small cache on a faulty disk, and what they left behind."""

import gc
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from offload.peak_memory import PeakMemory
from offload.soak_round import SoakRound
from offload.soak_tally import Tally
from offload.tiers.faults import FaultPlan

ACTIONS_PER_ROUND: Final = 80
MAX_GROWTH_BYTES: Final = 64 << 20
"""Of peak memory after the first round: a hundred times what all tiers of a round hold."""

_GRACE_S: Final = 5.0


class Gate(NamedTuple):
    """One number that must not exceed its limit.

    Attributes
    ----------
    name : str
    value, limit : int
    is_bytes : bool
    """

    name: str
    value: int
    limit: int = 0
    is_bytes: bool = False

    @property
    def has_passed(self) -> bool:
        """Whether it does not."""
        return self.value <= self.limit


@dataclass(frozen=True, slots=True)
class SoakReport:
    """What a soak found.

    Attributes
    ----------
    seed : int
        Of the first round; the next ones count on from it.
    faults : FaultPlan
    num_rounds : int
    duration_s : float
    tally : Tally
    num_threads, num_descriptors : int
        More than at the start, at the end of the worst round.
    num_folders : int
        Of disk tiers that were not removed.
    growth_bytes : int
        Peak of resident memory over what was resident after the first round.
    """

    seed: int
    faults: FaultPlan
    num_rounds: int
    duration_s: float
    tally: Tally
    num_threads: int
    num_descriptors: int
    num_folders: int
    growth_bytes: int

    @property
    def gates(self) -> list[Gate]:
        """What decides whether the soak has passed."""
        tally = self.tally
        return [
            Gate("wrong results", len(tally.wrong)),
            Gate("lost chunks", len(tally.lost)),
            Gate("damage not noticed", len(tally.unnoticed)),
            Gate("broken invariants", len(tally.broken)),
            Gate("threads left", self.num_threads),
            Gate("descriptors left", self.num_descriptors),
            Gate("folders left", self.num_folders),
            Gate("memory growth", self.growth_bytes, MAX_GROWTH_BYTES, is_bytes=True),
        ]

    @property
    def findings(self) -> list[str]:
        """What was wrong, one sentence each, with the seed of its round."""
        tally = self.tally
        return [*tally.wrong, *tally.lost, *tally.unnoticed, *tally.broken]

    @property
    def has_passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.has_passed for gate in self.gates)


def soak(
    seed: int,
    faults: FaultPlan,
    directory: Path | None,
    goes_on: Callable[[int, float], bool],
) -> SoakReport:
    """Run rounds; stop early if an invariant is broken.

    Parameters
    ----------
    seed : int
    faults : FaultPlan
    directory : Path or None
        For the disk tiers; by default where caches keep theirs.
    goes_on : callable
        Told the rounds that have ended and the seconds since the start, whether there is another.

    Raises
    ------
    ConfigError
        The directory cannot be used.
    """
    tally, started_s = Tally(), time.monotonic()
    leftovers, num_rounds, memory = _Leftovers(), 0, PeakMemory()
    with ExitStack() as stack:
        while goes_on(num_rounds, time.monotonic() - started_s) and not tally.broken:
            this = SoakRound(seed + num_rounds, faults, directory, tally)
            this.run(ACTIONS_PER_ROUND)
            leftovers.look(this.folder)
            num_rounds += 1
            if num_rounds == 1:  # whatever is loaded and cached for good is there by now
                stack.enter_context(memory)
    return SoakReport(
        seed,
        faults,
        num_rounds,
        time.monotonic() - started_s,
        tally,
        leftovers.num_threads,
        leftovers.num_descriptors,
        leftovers.num_folders,
        memory.growth_bytes,
    )


class _Leftovers:
    """Threads, descriptors and folders that rounds leave behind.

    Attributes
    ----------
    num_threads, num_descriptors : int
        More than at the start; the most that ``look`` found.
    num_folders : int
        Of disk tiers that were not removed.
    """

    num_threads = num_descriptors = num_folders = 0

    def __init__(self) -> None:
        self._threads = set(threading.enumerate())
        self._num_descriptors = psutil.Process().num_fds()

    def look(self, folder: Path) -> None:
        """Compare with the start; ``folder`` was that of the round."""
        gc.collect()  # a descriptor closes with its owner, which a cycle may have kept
        started = set(threading.enumerate()) - self._threads
        for thread in started:
            thread.join(_GRACE_S)  # told to stop, it may be on its way out
        num_alive = sum(thread.is_alive() for thread in started)
        num_opened = psutil.Process().num_fds() - self._num_descriptors
        self.num_threads = max(self.num_threads, num_alive)
        self.num_descriptors = max(self.num_descriptors, num_opened)
        self.num_folders += folder.exists()
