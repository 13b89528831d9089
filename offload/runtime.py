"""The layers of one cache on an engine. Knows tensors; knows nothing of Hugging Face."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
from torch import Tensor

from offload.coded_past import read_codes
from offload.engine import Engine
from offload.errors import CapacityError
from offload.exact import AttentionCall, PastChunks, attend
from offload.index.exact import visible_chunks
from offload.prefetch.plan import LayerPlan, LoadGroup, place_of, plan_layer, slot_at
from offload.remote_room import stats_of_both
from offload.sequence import Appended, LayerSequence, check_states
from offload.sparse.retrieval import Layer
from offload.sparse.self_check import ErrorStats
from offload.stats import CacheStats, TierStats
from offload.tiers.coded import CodedTier
from offload.tiers.memory import MemoryTier
from offload.tiers.pool import grid_view
from offload.tiers.remote_below import DiskThenRemote
from offload.types import ChunkId, Partial

_PlanKey = tuple[int, int, range, range]
"""Versions of the row lists and of the store, what is visible, and what of it is not streamed."""


class Runtime:
    """The rows of every layer of one cache.

    Forks share the engine and, copy-on-write, the chunks. One thread at a time runs a model on a
    runtime; forks may run on different threads (they take turns on the engine's lock).

    Parameters
    ----------
    engine : Engine
    num_layers : int
        Layers expected; the device keeps room for their tails.
    batch : int
    """

    def __init__(self, engine: Engine, num_layers: int, batch: int) -> None:
        self.engine = engine
        self.layers: dict[int, LayerSequence] = {}
        self._num_layers = num_layers
        self._batch = batch
        self._plans: dict[int, tuple[_PlanKey, LayerPlan]] = {}
        self._closed = False
        with engine.lock:
            engine.reserve_tails(id(self), self._tail_bytes(num_layers, batch), batch)
            engine.acquire()

    def layer(self, index: int) -> LayerSequence:
        """Return a layer's sequence, opening it with the current batch if it is new."""
        if index not in self.layers:
            if len(self.layers) >= self._num_layers:
                self._reserve(len(self.layers) + 1, self._batch)
            sequence = LayerSequence(self.engine.store, index)
            sequence.open(self._batch, self.engine.device)
            self.layers[index] = sequence
        return self.layers[index]

    def append(self, index: int, keys: Tensor, values: Tensor) -> Appended:
        """Add tokens to a layer; see ``LayerSequence.append``."""
        with self.engine.lock:
            sequence = self.layer(index)
            check_states(keys, values, sequence.tail, index, self.engine.layout.key_dim)
            try:
                return sequence.append(keys, values)
            except CapacityError:
                # Loads on a wrong guess may be all that keeps some chunks alive.
                self.engine.stream.drain()
                self.engine.settle()
                return sequence.append(keys, values)

    def attend(self, index: int, call: AttentionCall, appended: Appended) -> Tensor:
        """Attend to all that the preset reads; see ``offload.exact.attend``."""
        layout = self.engine.layout
        num_past = appended.num_past_chunks * layout.chunk_tokens
        with self.engine.lock:
            sparse, late, skipped = self._begin(index, call, appended)
            with closing(self._past(index, call, appended, skipped)) as past:
                return attend(call, past, appended, num_past, layout.key_dim, sparse, late)

    def _begin(
        self, index: int, call: AttentionCall, appended: Appended
    ) -> tuple[list[Partial], Callable[[], Partial] | None, range]:
        """Return attention over chunks that are not streamed, now and later, and which these are.

        Those are read sparsely, or attended where they lie.
        """
        retrieval, in_place = self.engine.retrieval, self.engine.in_place
        if retrieval is None and in_place is None:
            return [], None, range(0)
        sequence = self.layers[index]
        layer = Layer(
            id(self),
            index,
            list(self.layers).index(index),
            sequence.tables.version,
            sequence.tables.rows,
            appended.num_past_chunks,
            sequence.num_tokens,
        )
        if retrieval is not None:
            parts, covered = retrieval.attend(layer, call)
            return parts, None, covered
        assert in_place is not None
        asked, covered = in_place.start(layer, call)
        return [], None if asked is None else partial(in_place.finish, asked, call), covered

    def select(self, index: int, indices: Sequence[int]) -> None:
        """Make row ``i`` of one layer a copy of its row ``indices[i]``.

        Raises
        ------
        CapacityError
            The device cannot hold the tails and staging of so many rows. The rows are as before;
            chunks may have moved down.
        """
        with self.engine.lock:
            if len(indices) > self._batch:
                self._reserve(max(self._num_layers, len(self.layers)), len(indices))
            self._batch = len(indices)
            self.layer(index).select(indices)

    def crop(self, index: int, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens of every row of one layer."""
        with self.engine.lock:
            self.layers[index].crop(num_tokens)

    def read_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a layer; see ``LayerSequence.read_all``."""
        with self.engine.lock:
            return self.layers[index].read_all()

    def fork(self) -> "Runtime":
        """Return a copy that shares every chunk with this one; only the tails are copied.

        Raises
        ------
        CapacityError
            The device cannot hold another set of tails.
        """
        with self.engine.lock:
            copy = Runtime(self.engine, max(self._num_layers, len(self.layers)), self._batch)
            copy.layers = {index: layer.fork() for index, layer in self.layers.items()}
            return copy

    def flush(self) -> None:
        """Wait for every store in flight; raises if one failed."""
        with self.engine.lock:
            self.engine.store.drain()

    def stats(self) -> CacheStats:
        """Return what is where, and what has moved so far, forks included."""
        with self.engine.lock:
            return _collect(self)

    def check_integrity(self) -> None:
        """Raise AssertionError if tiers, table and row lists disagree. Without forks only."""
        if self.engine.retrieval is not None:
            self.engine.retrieval.settle()
        self.engine.settle()
        self.engine.store.check_integrity()
        table, counted = self.engine.store.table, dict.fromkeys(self.engine.store.table, 0)
        for sequence in self.layers.values():
            for row in {id(row): row for row in sequence.tables.rows}.values():
                for chunk in row:
                    counted[chunk] += 1
        for chunk in table:
            assert table[chunk].ref_count == counted[chunk], f"chunk {chunk}: wrong ref_count"
        for name, tier in self.stats().tiers.items():
            assert tier.peak_bytes <= tier.capacity_bytes, f"{name} over capacity"

    def close(self) -> None:
        """Give back every chunk; the last fork stops the engine. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with self.engine.lock:
            try:
                for kept in (self.engine.retrieval, self.engine.in_place):
                    if kept is not None:
                        kept.forget(id(self))
                if self.engine.is_shared:  # else everything goes at once with the tiers
                    for sequence in self.layers.values():
                        sequence.close()
            finally:
                self.engine.release(id(self))

    def _tail_bytes(self, num_layers: int, batch: int) -> int:
        return num_layers * batch * self.engine.layout.chunk_bytes

    def _reserve(self, num_layers: int, batch: int) -> None:
        self.engine.reserve_tails(id(self), self._tail_bytes(num_layers, batch), batch)
        self._num_layers = num_layers

    def _past(
        self, index: int, call: AttentionCall, appended: Appended, skipped: range
    ) -> Generator[PastChunks | Partial, None, None]:
        """Yield the past chunks that the call can see: first those in place, then the streamed.

        Of those that are encoded in place, attention over them.
        """
        layout, size = self.engine.layout, self.engine.layout.chunk_tokens
        num_new = 0 if appended.keys is None else appended.keys.shape[2]
        total = appended.num_past_chunks * size + appended.tail.shape[2] + num_new
        first_query = total - call.query.shape[2]
        visible = visible_chunks(appended.num_past_chunks, size, first_query, call.window)
        plan = self._plan(index, visible, skipped)
        batch = self._batch
        for run in plan.runs:
            level, slot = slot_at(run.base)
            tier = self.engine.tiers[level]
            if isinstance(tier, CodedTier):
                steps = run.strides[1] * np.arange(run.count)
                slots = slot + run.strides[0] * np.arange(batch)[:, None] + steps
                yield from read_codes(tier, slots, run.start * size, call, first_query)
                continue
            assert isinstance(tier, MemoryTier)
            rows = tier.pool.chunks(slot, run.strides, (batch, run.count), layout)
            yield PastChunks(run.start * size, rows)
        if not plan.groups:
            return
        upcoming = [] if skipped else self._upcoming(index, call.window)
        for group, buffer in self.engine.stream.read(plan.groups, upcoming):
            staged = self.engine.loader.buffers[buffer]
            rows = grid_view(staged, 0, (1, batch), (batch, group.count), layout)
            yield PastChunks(group.start * size, rows)

    def _plan(self, index: int, visible: range, skipped: range = range(0)) -> LayerPlan:
        tables, store = self.layers[index].tables, self.engine.store
        key = (tables.version, store.version, visible, skipped)
        known = self._plans.get(index)
        if known is not None and known[0] == key:
            return known[1]
        plans = []
        for part in _without(visible, skipped):
            rows = [row[: part.stop] for row in tables.rows]
            places = [[self._place(chunk) for chunk in row] for row in rows]
            plans.append(plan_layer(rows, places, self.engine.buffer_chunks, part.start))
        plan = LayerPlan(
            tuple(run for each in plans for run in each.runs),
            tuple(group for each in plans for group in each.groups),
        )
        self._plans[index] = (key, plan)
        return plan

    def _place(self, chunk: ChunkId) -> int | None:
        """Return where compute can read a chunk, None if it has to be loaded."""
        slots = self.engine.store.table[chunk].slots
        level = min(slots, default=len(self.engine.tiers))
        return place_of(level, slots[level]) if level < self.engine.num_readable else None

    def _upcoming(self, index: int, window: int | None) -> Sequence[LoadGroup]:
        """Guess what is read after this layer: the next one, or the first one of the next step."""
        order = list(self.layers)
        following = order[(order.index(index) + 1) % len(order)]
        sequence, size = self.layers[following], self.engine.layout.chunk_tokens
        past = sequence.tables.num_positions
        visible = visible_chunks(past, size, sequence.num_tokens, window)
        return self._plan(following, visible).groups


def _without(whole: range, part: range) -> list[range]:
    """Return what is left of a range without a part of it."""
    if not part:
        return [whole]
    before = range(whole.start, min(whole.stop, part.start))
    after = range(max(whole.start, part.stop), whole.stop)
    return [left for left in (before, after) if left]


def _collect(runtime: Runtime) -> CacheStats:
    engine = runtime.engine
    counters, table = engine.counters, engine.store.table
    tiers: dict[str, TierStats] = {}
    for level, tier in enumerate(engine.tiers):
        if isinstance(tier, DiskThenRemote):
            tiers |= stats_of_both(tier, table, counters, level)
            continue
        beside = engine.beside_chunks_bytes(tier.name)
        num_chunks = sum(level in table[chunk].slots for chunk in table)
        each = engine.layout.chunk_tokens / max(1, len(runtime.layers))
        tiers[tier.name] = TierStats(
            used_bytes=tier.used_bytes + beside,
            peak_bytes=engine.peak_bytes(level),
            capacity_bytes=engine.config.capacities[tier.name],
            num_chunks=num_chunks,
            loaded_bytes=counters.loaded_bytes.get(tier.name, 0),
            stored_bytes=counters.stored_bytes.get(tier.name, 0),
            codec=engine.config.codec_of(tier.name),
            ratio=engine.layout.slot_bytes / tier.slot_bytes,
            num_tokens=int(num_chunks * each),
            max_tokens=int(tier.num_slots * each),
        )
    errors = ErrorStats() if engine.retrieval is None else engine.retrieval.errors
    asked = counters.prefetched_groups + counters.demanded_groups
    return CacheStats(
        tiers=tiers,
        num_tokens=max((s.num_tokens for s in runtime.layers.values()), default=0),
        num_chunks=len(table),
        tail_bytes=engine.tail_bytes,
        staging_bytes=engine.loader.num_bytes,
        load_wait_s=counters.load_wait_s,
        store_wait_s=counters.store_wait_s,
        prefetch_hit_rate=counters.prefetched_groups / asked if asked else 0.0,
        promoted_chunks=counters.promoted_chunks,
        demoted_chunks=counters.demoted_chunks,
        covered_tokens=counters.covered_tokens,
        retrieved_tokens=counters.retrieved_tokens,
        scanned_bytes=counters.scanned_bytes,
        index_bytes=0 if engine.retrieval is None else engine.retrieval.index_bytes,
        num_checks=errors.num_checks,
        error_median=errors.median,
        error_p95=errors.p95,
        rows=engine.row_stats(),
        pipeline=None if engine.pipeline is None else engine.pipeline.stats(),
        near=None if engine.in_place is None else engine.in_place.stats(),
        failed_exchanges=counters.failed_exchanges,
        failed_stores=counters.failed_stores,
        unneeded_failures=counters.unneeded_failures,
        rescued_chunks=counters.rescued_chunks,
    )
