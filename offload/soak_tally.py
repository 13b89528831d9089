"""What a soak has done and found so far. Nouns only."""

from collections import Counter
from dataclasses import dataclass, field

from offload.tiers.faults import FaultCounts


@dataclass(slots=True)
class Tally:
    """Counts and findings of all rounds.

    Attributes
    ----------
    actions, errors : Counter
        By name of the action, and by class of the error that an action raised.
    faults : FaultCounts
    num_results, num_chunks : int
        Attention results, and copies of chunks, that were compared.
    num_detected : int
        Damaged records that the audits found refused.
    num_reset : int
        Caches that an error left good for nothing but a reset.
    num_rescued : int
        Chunks that the disk refused and that found room in memory.
    wrong : list of str
        Results and chunks that are not what they should be.
    lost : list of str
        Chunks that nobody damaged, and that cannot be read.
    unnoticed : list of str
        Damaged records that were not refused.
    broken : list of str
        Invariants that do not hold.
    """

    actions: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: FaultCounts = field(default_factory=FaultCounts)
    num_results: int = 0
    num_chunks: int = 0
    num_detected: int = 0
    num_reset: int = 0
    num_rescued: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unnoticed: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
