"""Compare sparse attention with exact attention now and then, in the background."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from offload.store import ChunkStore
from offload.tiers.base import ReadsParts
from offload.tiers.coded import CodedTier
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import as_chunk, page_aligned
from offload.types import ChunkId, Partial

_KEPT = 1024
_BURST_CHUNKS = 256


@dataclass(frozen=True, slots=True)
class ErrorStats:
    """Relative errors of what sparse attention returned for the tokens it was responsible for.

    Attributes
    ----------
    num_checks : int
        All so far; the quantiles are of the last 1,024.
    median, p95 : float
        Of ``|estimated - exact| / |exact|``; 0 before the first check.
    """

    num_checks: int = 0
    median: float = 0.0
    p95: float = 0.0


class SelfCheck:
    """Draws one KV head of one call in so many, and attends to all its keys on a thread of its own.

    Only the thread that holds the engine's lock calls methods. The chunks that a check reads are
    protected until the first call after its end.

    Parameters
    ----------
    store : ChunkStore
    every : int
        Calls per check, on average. No check starts while one is under way.
    observe : callable
        Told every error, by the thread that calls methods.
    seed : int
    """

    def __init__(
        self,
        store: ChunkStore,
        every: int,
        observe: Callable[[float], None] = lambda error: None,
        seed: int = 0,
    ) -> None:
        self._store = store
        self._every = every
        self._observe = observe
        self._random = random.Random(seed)
        self._executor: ThreadPoolExecutor | None = None
        self._running: tuple[Future[float], list[ChunkId]] | None = None
        self._errors: deque[float] = deque(maxlen=_KEPT)
        self._num_checks = 0

    def draw(self, num_heads: int) -> int | None:
        """Return which of so many heads to check in this call, or None."""
        self._reap()
        if self._running is not None or self._random.randrange(self._every):
            return None
        return self._random.randrange(num_heads)

    def settle(self) -> None:
        """Wait for the check under way."""
        if self._running is not None:
            self._running[0].exception()
            self._reap()

    def start(self, head: int, query: Tensor, chunks: Sequence[ChunkId], found: Partial) -> None:
        """Check one head.

        Parameters
        ----------
        head : int
        query : Tensor, shape (num_queries, key_dim), float32
            Scaled.
        chunks : sequence of ChunkId
            All that ``found`` is about.
        found : Partial
            ``out`` [num_queries, value_dim].
        """
        if any(self._store.table[chunk].pending is not None for chunk in chunks):
            return  # its write buffer may go to another chunk meanwhile
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="offload-check")
        self._store.table.protect(chunks)
        query, out = query.cpu().clone(), found.out.cpu().clone()
        future = self._executor.submit(self._error, head, query, tuple(chunks), out)
        self._running = future, list(chunks)

    def stats(self) -> ErrorStats:
        """Return the errors so far."""
        self._reap()
        if not self._errors:
            return ErrorStats()
        errors = torch.tensor(list(self._errors))
        median, p95 = errors.quantile(torch.tensor([0.5, 0.95])).tolist()
        return ErrorStats(self._num_checks, median, p95)

    def close(self) -> None:
        """Wait for the check under way and stop the thread. Idempotent."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
        self._reap()

    def _reap(self) -> None:
        if self._running is None or not self._running[0].done():
            return
        future, chunks = self._running
        self._running = None
        self._store.unprotect(chunks)
        if future.exception() is None:
            self._errors.append(future.result())
            self._observe(future.result())
            self._num_checks += 1
        # A check that could not read is no check; who needs those chunks will meet the error.

    def _error(self, head: int, query: Tensor, chunks: tuple[ChunkId, ...], found: Tensor) -> float:
        layout = self._store.layout
        total, peak = torch.zeros_like(found), torch.full(query.shape[:1], -torch.inf)
        weight = torch.zeros_like(peak)
        for start in range(0, len(chunks), _BURST_CHUNKS):
            rows = self._rows(head, chunks[start : start + _BURST_CHUNKS]).float()
            logits = query @ rows[:, : layout.key_dim].T
            highest = torch.maximum(peak, logits.amax(-1))
            share, kept = (logits - highest[:, None]).exp(), (peak - highest).exp()
            weight = weight * kept + share.sum(-1)
            total = total * kept[:, None] + share @ rows[:, layout.key_dim :]
            peak = highest
        exact = total / weight[:, None]
        errors = (found - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)
        return float(errors.max())

    def _rows(self, head: int, chunks: Sequence[ChunkId]) -> Tensor:
        """Return one head's rows of chunks that are protected, on the host."""
        layout, disk = self._store.layout, len(self._store.tiers) - 1
        head_bytes = layout.chunk_bytes // layout.num_kv_heads
        memory = page_aligned(len(chunks) * head_bytes).view(len(chunks), head_bytes)
        on_disk = []
        for row, chunk in zip(memory, chunks, strict=True):
            entry = self._store.table[chunk]
            level = min(entry.slots)
            tier = self._store.tiers[level]
            if isinstance(tier, MemoryTier):
                source = as_chunk(tier.buffer(entry.slots[level]), layout)[head]
                row.view(layout.dtype).copy_(source.reshape(-1))
            elif isinstance(tier, CodedTier):
                lines = head * layout.chunk_tokens + np.arange(layout.chunk_tokens)
                slots = np.full_like(lines, entry.slots[level])
                row.copy_(torch.from_numpy(tier.read_rows(slots, lines)).view(-1))
            else:
                on_disk.append((entry, row))
        if on_disk:
            tier = self._store.tiers[disk]
            assert isinstance(tier, ReadsParts)
            each = tier.parts_per_head
            tier.read_parts(
                [entry.slots[disk] for entry, _ in on_disk],
                [entry.info for entry, _ in on_disk],
                slice(head * each, (head + 1) * each),
                [row for _, row in on_disk],
            ).wait(self._store.deadline_s)
        return memory.view(layout.dtype).view(-1, layout.row_dim)
