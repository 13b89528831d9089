"""Attention over the chunks that only the disk holds, by the workers that hold them."""

import time

import numpy as np
from numpy.typing import NDArray

from offload.exact import AttentionCall
from offload.near_plan import NearPlan
from offload.sparse.calls import hidden_tokens, is_plain
from offload.sparse.retrieval import Layer
from offload.store import ChunkStore
from offload.tiers.near.call import NearCall
from offload.tiers.near.disk import NearDisk
from offload.types import ChunkId, Partial

_Key = tuple[int, int, int, int]
"""Versions of the rows and of the store, and the first and last chunk that may be attended."""


class InPlace:
    """Asks storage-side workers to attend, for all layers and forks of a cache.

    Chunks that lie in memory, too, are not theirs; nor are those on their way down. A prompt's
    queries are too many for them: its past is fetched.

    Only the thread that holds the engine's lock calls methods.

    Parameters
    ----------
    store : ChunkStore
    disk : NearDisk
    plan : NearPlan
    deadline_s : float
        Longest wait for an answer.
    """

    def __init__(
        self, store: ChunkStore, disk: NearDisk, plan: NearPlan, deadline_s: float
    ) -> None:
        self.disk = disk
        self.plan = plan
        self._store = store
        self._deadline_s = deadline_s
        self._how = plan.how(store.layout.key_dim)
        self._names: dict[tuple[int, int, int], int] = {}
        self._next_name = 0
        self._num_calls = 0
        self._wait_s = 0.0
        self._rows: dict[tuple[int, int], tuple[_Key, range, list[NDArray[np.int64]]]] = {}

    def start(self, layer: Layer, call: AttentionCall) -> tuple[NearCall | None, range]:
        """Ask the workers to attend.

        Returns
        -------
        asked : NearCall or None
            None if there is nothing for them to do.
        covered : range
            The chunks that they attend to; the others are the caller's.
        """
        hidden = hidden_tokens(call.mask)
        num_queries = call.query.shape[2]
        if hidden is None or not is_plain(call) or num_queries > self.plan.max_queries:
            return None, range(0)
        size = self._store.layout.chunk_tokens
        if self._how is not None:
            # What is on its way down would be attended exactly, and answers depend on the moment.
            self._store.drain()
        covered, slots = self._rows_on_disk(layer, -(-hidden // size))
        if not covered:
            return None, range(0)
        # Each query of a row is a row of its own to the workers.
        query = call.query.transpose(1, 2).flatten(0, 1).cpu()
        names = [self._name(layer, row) for row in range(len(layer.rows))]
        rows = [pair for pair in zip(names, slots, strict=True) for _ in range(num_queries)]
        self._count(len(covered) * size, len(rows))
        return self.disk.attend(query, rows, call.scale, self._how), covered

    def finish(self, asked: NearCall, call: AttentionCall) -> Partial:
        """Wait for the answers.

        Returns
        -------
        Partial
            ``out`` [batch, num_heads, num_queries, value_dim], on the device of the query.
        """
        batch, _, num_queries, _ = call.query.shape
        started = time.perf_counter()
        out, lse = asked.wait(self._deadline_s)
        self._wait_s += time.perf_counter() - started
        device = call.query.device
        return Partial(
            out.unflatten(0, (batch, num_queries)).transpose(1, 2).to(device),
            lse.unflatten(0, (batch, num_queries)).transpose(1, 2).to(device),
        )

    def stats(self) -> dict[str, float]:
        """Return what crossed so far, and what it took.

        ``asked_bytes`` and ``answered_bytes`` are queries and answers, ``written_bytes`` and
        ``fetched_bytes`` keys and values; ``read_bytes`` did not cross: it was read by workers, in
        ``num_reads`` requests. ``num_calls`` of layers, ``wait_s`` in which the model stood still
        for them, ``num_restarts`` of workers.
        """
        crossed = self.disk.bus.bytes._asdict()
        num_reads = crossed.pop("num_reads")
        return {
            **{f"{name}_bytes": count for name, count in crossed.items()},
            "num_reads": num_reads,
            "num_calls": self._num_calls,
            "wait_s": self._wait_s,
            "num_restarts": sum(member.link.num_restarts for member in self.disk.members),
        }

    def forget(self, owner: int) -> None:
        """Drop what is kept for one cache or fork."""
        gone = [key for key in self._names if key[0] == owner]
        self.disk.forget_rows([self._names.pop(key) for key in gone])
        self._rows = {key: kept for key, kept in self._rows.items() if key[0] != owner}

    def _count(self, num_tokens: int, num_rows: int) -> None:
        counters, each = self._store.counters, num_rows * self._store.layout.num_kv_heads
        read = num_tokens if self._how is None else self._how.num_tokens(num_tokens)
        counters.covered_tokens += num_tokens * each
        counters.retrieved_tokens += read * each
        self._num_calls += 1

    def _name(self, layer: Layer, row: int) -> int:
        key = (layer.owner, layer.index, row)
        if key not in self._names:
            self._names[key] = self._next_name
            self._next_name += 1
        return self._names[key]

    def _rows_on_disk(self, layer: Layer, first: int) -> tuple[range, list[NDArray[np.int64]]]:
        """Return the longest run of positions whose chunks only the disk holds, and their slots."""
        key = (layer.version, self._store.version, first, layer.num_past_chunks)
        known = self._rows.get((layer.owner, layer.index))
        if known is None or known[0] != key:
            rows = [row[: layer.num_past_chunks] for row in layer.rows]
            slots = np.array([[self._slot(chunk) for chunk in row] for row in rows], np.int64)
            is_there = (slots.min(0, initial=0) >= 0).astype(np.int8)
            is_there[:first] = 0
            run = _longest_run(is_there)
            columns = [np.ascontiguousarray(row[run.start : run.stop]) for row in slots]
            known = (key, run, columns)
            self._rows[layer.owner, layer.index] = known
        return known[1:]

    def _slot(self, chunk: ChunkId) -> int:
        """Return where the disk holds a chunk; -1 if memory does, or it is on its way."""
        slots, disk = self._store.table[chunk].slots, len(self._store.tiers) - 1
        return slots[disk] if disk in slots and len(slots) == 1 else -1


def _longest_run(flags: NDArray[np.int8]) -> range:
    edges = np.flatnonzero(np.diff(flags, prepend=0, append=0))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return range(0)
    best = int((ends - starts).argmax())
    return range(int(starts[best]), int(ends[best]))
