"""What a benchmark finds: one row per cell and contender."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from offload.bench.limits import Bandwidths


@dataclass(slots=True)
class Sample:
    """What was seen of one contender on one cell.

    Attributes
    ----------
    rounds : list of list of float
        Seconds of every step, by round.
    fill_s, first_s : float
        Filling the cache (or reading the prompt), and the first step, index included.
    counts : mapping
        Growth of its counters over the steps of ``rounds``.
    errors : list of float
        Relative errors of outputs.
    rss_bytes : int
        Growth of resident memory while it was filled and made its first step.
    hbm_bytes : int or None
        Likewise of device memory.
    index_bytes : int
    prefetch_rate : float or None
    """

    rounds: list[list[float]] = field(default_factory=list)
    fill_s: float = 0.0
    first_s: float = 0.0
    counts: Mapping[str, float] = field(default_factory=dict)
    errors: list[float] = field(default_factory=list)
    rss_bytes: int = 0
    hbm_bytes: int | None = None
    index_bytes: int = 0
    prefetch_rate: float | None = None

    @property
    def num_steps(self) -> int:
        """Steps that count."""
        return sum(map(len, self.rounds))


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One contender on one cell. Bytes are per step, in which every row gets one token.

    Attributes
    ----------
    level, model, contender : str
    num_layers, num_tokens, batch, num_steps, num_rounds : int
    ram_share : float or None
    kv_bytes : int
        Of all keys and values.
    tokens_per_s, ms_median, ms_p95 : float
    first_ms : float
        The first step, index included.
    fill_s : float
    ratio, ratio_low, ratio_high : float
        How many times faster than the first contender: median over rounds, least and most.
    scanned_bytes, read_bytes : float or None
        Of indexes, and of keys and values that were attended to.
    host_bytes, disk_bytes : float or None
        From host memory to the device, and from disk.
    bus_bytes : float or None
        Queries, answers, new keys and values between a cache and storage-side workers.
    hit_rate : float or None
        Of rows that no tier's memory had, the share that a cache of lines had.
    prefetch_rate : float or None
        Of chunks that were streamed, the share under way before they were asked for.
    hidden_share : float or None
        Share of the time of reading from disk in which the model did not wait.
    rss_bytes, index_bytes : int
    hbm_bytes : int or None
    error_median : float or None
        Relative, of outputs.
    limit_ms : float or None
        What moving the bytes takes at least.
    limit_share : float or None
        That, as a share of the time it took; median over rounds.
    bandwidths : Bandwidths
        Medians over the rounds of the cell.
    query_cosine : float
        Mean cosine of the queries of successive steps.
    note : str
        What else was decided, such as the form of dense attention.
    """

    level: str
    model: str
    contender: str
    num_layers: int
    num_tokens: int
    batch: int
    num_steps: int
    num_rounds: int
    ram_share: float | None
    kv_bytes: int
    tokens_per_s: float
    ms_median: float
    ms_p95: float
    first_ms: float
    fill_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    scanned_bytes: float | None
    read_bytes: float | None
    host_bytes: float | None
    disk_bytes: float | None
    bus_bytes: float | None
    hit_rate: float | None
    prefetch_rate: float | None
    hidden_share: float | None
    rss_bytes: int
    index_bytes: int
    hbm_bytes: int | None
    error_median: float | None
    limit_ms: float | None
    limit_share: float | None
    bandwidths: Bandwidths
    query_cosine: float
    note: str


def ratios(of: Sample, to: Sample) -> list[float]:
    """Return how many times faster than another sample each round was, by medians of its steps."""
    return [
        statistics.median(theirs) / statistics.median(mine)
        for mine, theirs in zip(of.rounds, to.rounds, strict=True)
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
