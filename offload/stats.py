"""Counters of one cache, and the frozen view of them that ``cache.stats()`` hands out."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class BusyTime:
    """How long at least one of many things was under way. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_running = 0
        self._since_s = 0.0
        self._total_s = 0.0

    @property
    def total_s(self) -> float:
        """Seconds so far; what runs now counts when the last of it ends."""
        return self._total_s

    def run(self, job: Callable[..., object], *args: Any) -> None:
        """Run a job, and count the time."""
        with self._lock:
            if not self._num_running:
                self._since_s = time.perf_counter()
            self._num_running += 1
        try:
            job(*args)
        finally:
            with self._lock:
                self._num_running -= 1
                if not self._num_running:
                    self._total_s += time.perf_counter() - self._since_s


@dataclass(slots=True)
class Counters:
    """What happened since the cache was made. Written by the thread that runs the model.

    Attributes
    ----------
    loaded_bytes, stored_bytes : dict
        Tier name to bytes read from it toward the device, and written into it.
    load_wait_s : float
        Time the model stood still for a load.
    store_wait_s : float
        Time the model stood still because the disk could not keep up (backpressure).
    prefetched_groups, demanded_groups : int
        Loads that were under way before they were asked for, and loads that were not.
    failed_prefetches : int
        Loads that failed but were not needed after all.
    promoted_chunks, demoted_chunks : int
        Chunks moved one tier up and down after their first placement.
    failed_exchanges : int
        Exchanges of chunks between memory and disk that did not take place: a transfer failed, the
        disk was full, or a chunk was in use.
    failed_stores : int
        Writes to the disk, of one or more chunks, that failed.
    unneeded_failures : int
        Those of chunks that nobody needed any more, which raised no error.
    rescued_chunks : int
        Chunks of failed stores that found room on a faster tier.
    covered_tokens, retrieved_tokens : int
        Tokens, per KV head and call, that sparse attention was responsible for, and those of them
        that it read.
    scanned_bytes : int
        Of indexes, read by searches.
    line_lookups, line_hits : int
        Rows of tokens that were needed and lay in no tier's memory, and those of them that were in
        the cache of lines.
    late_rows : int
        Rows that were needed and did not arrive in time; they stayed in the estimate.
    failed_row_reads : int
        Reads of rows that failed but were not needed, or are tried again.
    row_wait_s : float
        Time the model stood still for rows.
    anticipated_rows : int
        Rows that a look-ahead expected to be needed.
    foreseeable_rows, foreseen_rows : int
        Rows that were chosen by calls that a look-ahead had been for, and those of them that it had
        expected.
    """

    loaded_bytes: dict[str, int] = field(default_factory=dict)
    stored_bytes: dict[str, int] = field(default_factory=dict)
    load_wait_s: float = 0.0
    store_wait_s: float = 0.0
    prefetched_groups: int = 0
    demanded_groups: int = 0
    failed_prefetches: int = 0
    promoted_chunks: int = 0
    demoted_chunks: int = 0
    failed_exchanges: int = 0
    failed_stores: int = 0
    unneeded_failures: int = 0
    rescued_chunks: int = 0
    covered_tokens: int = 0
    retrieved_tokens: int = 0
    scanned_bytes: int = 0
    line_lookups: int = 0
    line_hits: int = 0
    late_rows: int = 0
    failed_row_reads: int = 0
    row_wait_s: float = 0.0
    anticipated_rows: int = 0
    foreseeable_rows: int = 0
    foreseen_rows: int = 0

    def add_loaded(self, tier: str, num_bytes: int) -> None:
        """Count bytes read from a tier."""
        self.loaded_bytes[tier] = self.loaded_bytes.get(tier, 0) + num_bytes

    def add_stored(self, tier: str, num_bytes: int) -> None:
        """Count bytes written into a tier."""
        self.stored_bytes[tier] = self.stored_bytes.get(tier, 0) + num_bytes


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier at one moment.

    Attributes
    ----------
    used_bytes, peak_bytes, capacity_bytes : int
        Occupied now, at most so far, and at most ever. The device counts the growing last chunks
        and the staging buffers, the disk its record headers.
    num_chunks : int
        Chunks that can be read from the tier now.
    loaded_bytes, stored_bytes : int
        Moved out of it toward the device, and into it, so far.
    codec : str
        How its chunks are encoded; ``used_bytes`` are those of codes in memory, and on the disk of
        whole records, of which codes fill a part.
    ratio : float
        Bytes of a chunk in memory by those that it takes in this tier's.
    num_tokens, max_tokens : int
        Tokens of all layers in ``num_chunks``, of all rows together, and those that the tier has
        room for.
    """

    used_bytes: int
    peak_bytes: int
    capacity_bytes: int
    num_chunks: int
    loaded_bytes: int
    stored_bytes: int
    codec: str = "raw"
    ratio: float = 1.0
    num_tokens: int = 0
    max_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RowStats:
    """How the disk was read, and single rows of it in particular.

    Attributes
    ----------
    num_lines, num_used_lines : int
        Rows that the cache of lines has room for, and that it holds.
    line_lookups, line_hits, late_rows : int
        See ``Counters``.
    failed_reads : int
        ``failed_row_reads`` of ``Counters``.
    anticipated_rows, foreseeable_rows, foreseen_rows : int
        See ``Counters``.
    wait_s : float
        Time the model stood still for rows and for loads of chunks.
    read_s : float
        Time during which at least one thread was reading from the disk.
    """

    num_lines: int = 0
    num_used_lines: int = 0
    line_lookups: int = 0
    line_hits: int = 0
    late_rows: int = 0
    failed_reads: int = 0
    wait_s: float = 0.0
    read_s: float = 0.0
    anticipated_rows: int = 0
    foreseeable_rows: int = 0
    foreseen_rows: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the rows in no tier's memory that were in the cache of lines."""
        return self.line_hits / self.line_lookups if self.line_lookups else 0.0

    @property
    def foreseen_share(self) -> float:
        """Share of the rows chosen by calls that a look-ahead had been for, which it expected."""
        return self.foreseen_rows / self.foreseeable_rows if self.foreseeable_rows else 0.0

    @property
    def hidden_share(self) -> float:
        """Share of the time spent reading during which the model did not stand still."""
        return max(0.0, 1 - self.wait_s / self.read_s) if self.read_s else 1.0


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What ``cache.stats()`` returns.

    Attributes
    ----------
    tiers : dict of str to TierStats
        By the names given to ``OffloadedCache``.
    num_tokens : int
        Tokens in the cache, per row.
    num_chunks : int
        Distinct chunks, shared ones counted once.
    tail_bytes, staging_bytes : int
        The growing last chunks, and the buffers that chunks stream through.
    load_wait_s, store_wait_s : float
        Time the model stood still for a load, and for a store.
    prefetch_hit_rate : float
        Share of streamed groups whose load had started before they were asked for.
    promoted_chunks, demoted_chunks : int
    failed_exchanges, failed_stores, unneeded_failures, rescued_chunks : int
        See ``Counters``.
    covered_tokens, retrieved_tokens : int
        Likewise.
    scanned_bytes : int
        Of indexes, read by searches; 0 on a CUDA device, which is not waited for to count.
    index_bytes : int
        Of the indexes of sparse attention.
    num_checks : int
        Sparse answers, of one KV head each, that were compared with exact attention.
    error_median, error_p95 : float
        Their relative errors, see ``ErrorStats``.
    rows : RowStats
        How the disk was read.
    pipeline : dict or None
        What the stages of reading take, and what the model of them expects, as
        ``PipelineStats.to_dict`` gives it; None where single rows are not read from a disk.
    near : dict or None
        What crossed between the cache and storage-side workers, as ``InPlace.stats`` gives it; None
        where there are none.
    """

    tiers: dict[str, TierStats]
    num_tokens: int
    num_chunks: int
    tail_bytes: int
    staging_bytes: int
    load_wait_s: float
    store_wait_s: float
    prefetch_hit_rate: float
    promoted_chunks: int
    demoted_chunks: int
    failed_exchanges: int = 0
    failed_stores: int = 0
    unneeded_failures: int = 0
    rescued_chunks: int = 0
    covered_tokens: int = 0
    retrieved_tokens: int = 0
    scanned_bytes: int = 0
    index_bytes: int = 0
    num_checks: int = 0
    error_median: float = 0.0
    error_p95: float = 0.0
    rows: RowStats = field(default_factory=RowStats)
    pipeline: dict[str, Any] | None = None
    near: dict[str, Any] | None = None
