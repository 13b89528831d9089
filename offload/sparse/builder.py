"""Build indexes from stored chunks, in the background where there is time."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.chunk_reader import start_read
from offload.index.base import KeyIndex
from offload.sparse.plan import IndexRecipe
from offload.store import ChunkStore
from offload.tiers.pool import as_chunk, page_aligned
from offload.tiers.transfer import Transfer
from offload.types import ChunkId, ChunkLayout

Segment = tuple[ChunkId, ...]

_MAX_RUNNING = 2
"""Builds under way; each holds a copy of its chunks in host memory."""


@dataclass(frozen=True, slots=True)
class Job:
    """What an index is built over.

    Attributes
    ----------
    chunks : Segment
    heads : tuple of int
        KV heads; the index has no others.
    recipe : IndexRecipe
    queries : Tensor or None, shape (len(heads), num_queries, key_dim)
    """

    chunks: Segment
    heads: tuple[int, ...]
    recipe: IndexRecipe
    queries: Tensor | None = None


class IndexBuilder:
    """Builds indexes, on a thread of its own or at once.

    Only the thread that holds the engine's lock calls methods. Chunks that a build reads are
    protected until the next build begins or is asked for.

    Parameters
    ----------
    store : ChunkStore
    device : torch.device
        Where indexes live.
    """

    def __init__(self, store: ChunkStore, device: torch.device) -> None:
        self._store = store
        self._device = device
        self._executor: ThreadPoolExecutor | None = None
        self._running: dict[Segment, Future[KeyIndex]] = {}
        self._done: dict[Segment, Future[KeyIndex]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of indexes that are built and were not asked for yet."""
        ended = [future for future in self._done.values() if future.exception() is None]
        return sum(future.result().num_bytes for future in ended)

    def start(self, job: Job) -> None:
        """Begin to build an index in the background, unless that was done already.

        Waits for an earlier one if too many are under way.
        """
        if job.chunks in self._running or job.chunks in self._done:
            return  # at once: while a prompt is read this is asked for every segment so far
        self.reap()
        while len(self._running) >= _MAX_RUNNING:
            next(iter(self._running.values())).exception()
            self.reap()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="offload-index")
        self._store.table.protect(job.chunks)
        try:
            memory, transfer = self._read(job.chunks)
            future = self._executor.submit(self._make, job, memory, transfer)
        except BaseException:
            self._store.unprotect(job.chunks)
            raise
        self._running[job.chunks] = future

    def finish(self, job: Job) -> KeyIndex:
        """Return the index over a segment, waiting for its build or building it now.

        Raises
        ------
        ConfigError
            A key or value is not finite.
        StorageError, TransferTimeout
            The chunks cannot be read.
        """
        future = self._running.get(job.chunks) or self._done.get(job.chunks)
        if future is None:
            return self._make(job, *self._read(job.chunks))
        future.exception()
        self.reap()
        del self._done[job.chunks]
        return future.result()

    def reap(self) -> None:
        """Give back the chunks of builds that have ended; forget those nobody can ask for."""
        for chunks in [chunks for chunks, future in self._running.items() if future.done()]:
            self._done[chunks] = self._running.pop(chunks)
            self._store.unprotect(chunks)
        table = self._store.table  # tokens are dropped from the end
        self._done = {
            chunks: future for chunks, future in self._done.items() if chunks[-1] in table
        }

    def settle(self) -> None:
        """Wait for the builds under way."""
        for future in self._running.values():
            future.exception()
        self.reap()

    def close(self) -> None:
        """Wait for the builds under way and stop the thread. Idempotent."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None
        self.reap()

    def _read(self, chunks: Sequence[ChunkId]) -> tuple[Tensor, Transfer]:
        """Begin to copy chunks into host memory, ``[len(chunks), slot_bytes]``."""
        store, layout = self._store, self._store.layout
        memory = page_aligned(len(chunks) * layout.slot_bytes).view(len(chunks), layout.slot_bytes)
        return memory, start_read(store.tiers, store.table, chunks, list(memory))

    def _make(self, job: Job, memory: Tensor, transfer: Transfer) -> KeyIndex:
        transfer.wait(self._store.deadline_s)
        layout = self._store.layout
        rows = _rows(memory, layout, job.heads).to(self._device)
        queries = None if job.queries is None else job.queries.to(self._device)
        return job.recipe.build(rows[..., : layout.key_dim], rows[..., layout.key_dim :], queries)


def _rows(memory: Tensor, layout: ChunkLayout, heads: tuple[int, ...]) -> Tensor:
    """Return the rows of some heads, ``[len(heads), num_tokens, row_dim]``."""
    chunks = [as_chunk(buffer, layout) for buffer in memory]
    if len(heads) < layout.num_kv_heads:
        chunks = [chunk[list(heads)] for chunk in chunks]
    return torch.cat(chunks, 1)
