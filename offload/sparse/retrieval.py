"""Sparse attention: search an index, read the tokens it names, estimate the others."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offload.exact import AttentionCall
from offload.index.base import NO_TOKEN, Hits, KeyIndex
from offload.kernels import dispatch
from offload.kernels.reference import merge
from offload.kernels.rows import attend_to
from offload.sparse.break_even import BreakEven
from offload.sparse.indexes import Holder, LayerIndexes
from offload.sparse.plan import SparsePlan
from offload.sparse.queries import QuerySample
from offload.sparse.row_keys import Ints
from offload.sparse.row_reader import RowReader
from offload.sparse.self_check import ErrorStats, SelfCheck
from offload.sparse.steering import ErrorSteering
from offload.store import ChunkStore
from offload.types import ChunkId, Partial

_SPARE_PART = 4
"""One more token is searched for, and fetched for the next step, for so many that are read."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of one cache or fork, at one call.

    Attributes
    ----------
    owner : int
        Identity of the cache or fork.
    index : int
        Of the layer in the model.
    number : int
        Of the layer among those that are offloaded.
    version : int
        Changes with the rows.
    rows : sequence of sequence of ChunkId
        The full chunks of every row.
    num_past_chunks : int
        Those of them that come before the queries.
    num_context : int
        Tokens that the last query sees.
    """

    owner: int
    index: int
    number: int
    version: int
    rows: Sequence[Sequence[ChunkId]]
    num_past_chunks: int
    num_context: int


class Retrieval:
    """Sparse attention over one store, for all layers and forks.

    Only the thread that holds the engine's lock calls methods.

    Parameters
    ----------
    store : ChunkStore
    rows : RowReader or None
        Finds the tokens that are read; needed with an index only.
    device : torch.device
        Of the model.
    plan : SparsePlan
    max_wait_s : float or None
        Longest wait for rows, of one layer; what has not arrived is estimated.
    """

    def __init__(
        self,
        store: ChunkStore,
        rows: RowReader | None,
        device: torch.device,
        plan: SparsePlan,
        max_wait_s: float | None = None,
    ) -> None:
        self.plan = plan
        self._store = store
        self._rows = rows
        self._break_even = BreakEven(plan, store.layout, device)
        self._keeps_rows = rows is not None and rows.num_lines > 0
        self._max_wait_s = max_wait_s
        self._device = device
        self._place = torch.device("cpu") if plan.placement == "host" else device
        self._indexes = (
            None if plan.index is None else LayerIndexes(store, self._place, plan.index, plan.sizes)
        )
        self._queries = QuerySample(plan.kept_queries)
        self._steering = ErrorSteering()
        self._check = SelfCheck(store, plan.check_every, self._observe)
        self._outlooks: dict[tuple[int, int], _Outlook] = {}

    @property
    def index_bytes(self) -> int:
        """Bytes of the indexes, and of the queries kept to build them."""
        built = 0 if self._indexes is None else self._indexes.num_bytes
        return built + self._queries.num_bytes

    @property
    def errors(self) -> ErrorStats:
        """How far off the answers were that were checked."""
        return self._check.stats()

    def settle(self) -> None:
        """Wait for what goes on in the background."""
        self._check.settle()
        if self._rows is not None:
            self._rows.settle()
        if self._indexes is not None:
            self._indexes.settle()

    def forget(self, owner: int) -> None:
        """Drop what is kept for one cache or fork."""
        if self._rows is not None:
            self._rows.forget(owner)
        if self._indexes is not None:
            self._indexes.forget(owner)
        self._outlooks = {key: kept for key, kept in self._outlooks.items() if key[0] != owner}

    def close(self) -> None:
        """Stop what goes on in the background. Idempotent."""
        self._check.close()
        if self._indexes is not None:
            self._indexes.close()

    def attend(self, layer: Layer, call: AttentionCall) -> tuple[list[Partial], range]:
        """Attend sparsely to the chunks that may be read so.

        Returns
        -------
        parts : list of Partial
            What that came to, ``out`` [batch, num_heads, num_queries, value_dim].
        covered : range
            The chunks it is about; the others are the caller's.
        """
        if layer.number < self.plan.dense_layers or not _is_plain(call):
            return [], range(0)
        hidden = _hidden_tokens(call.mask)
        if hidden is None:
            return [], range(0)
        size = self._store.layout.chunk_tokens
        ripe = self.plan.ripe(layer.num_past_chunks, size, layer.num_context, hidden)
        if call.query.shape[2] > self.plan.max_queries:
            self._prepare(layer, call, ripe)
            return [], range(0)
        covered = self.plan.covered(ripe, size)
        if covered and self._break_even.is_dense(layer.num_context, call.query.shape[1]):
            return [], range(0)
        if not covered or self._indexes is None:
            positions = call.query.shape[2] * len(layer.rows)
            self._store.counters.covered_tokens += (
                len(covered) * size * self._store.layout.num_kv_heads * positions
            )
            return [], covered
        outlook = self._outlooks.setdefault((layer.owner, layer.index), _Outlook())
        outlook.follow(layer.version, ripe, covered)
        parts = [self._attend_row(layer, call, row, outlook) for row in range(len(layer.rows))]
        return [Partial(*(torch.stack(both) for both in zip(*parts, strict=True)))], covered

    def _prepare(self, layer: Layer, call: AttentionCall, ripe: range) -> None:
        """Take note of a piece of a prompt, and begin to index what came before it."""
        for row, query in enumerate(call.query):
            self._queries.add((layer.index, row), query)
        heads = self._heads(layer)
        if self._indexes is not None and heads and not self.plan.kept_queries:
            for chunks in layer.rows:
                self._indexes.prepare(chunks[ripe.start : ripe.stop], heads)

    def _heads(self, layer: Layer) -> tuple[int, ...]:
        return self.plan.heads(layer.index, self._store.layout.num_kv_heads)

    def can_anticipate(self, layer: Layer) -> bool:
        """Whether a layer has the chunks it was last searched with, some of them in no memory."""
        outlook = self._outlooks.get((layer.owner, layer.index), _Outlook())
        return outlook.version == layer.version and self._is_beyond_memory(layer, outlook)

    def anticipate(self, layer: Layer, query: Tensor) -> None:
        """Begin to read what a layer will probably choose, where it is in no memory.

        Does not wait and changes no result. Does nothing unless ``can_anticipate``; so it never
        builds an index.

        Parameters
        ----------
        layer : Layer
            As it is before the token that is asked about is appended.
        query : Tensor, shape (batch, num_heads, key_dim)
            An estimate of what the layer will ask, scaled: ``query @ key`` is the logit.
        """
        heads = self._heads(layer)
        if not heads or not self.can_anticipate(layer):
            return
        assert self._rows is not None
        outlook = self._outlooks[layer.owner, layer.index]
        groups = (self._store.layout.num_kv_heads, -1)
        for row in range(len(layer.rows)):
            index, run = self._open_row(layer, row, outlook, heads)
            asked = query[row].float().unflatten(0, groups)[list(heads)].to(self._place)
            ids = self._search(asked, index, layer.num_context, has_spares=True)[1].cpu().numpy()
            outlook.expected[row] = ids
            self._store.counters.anticipated_rows += int(np.count_nonzero(ids >= 0))
            self._rows.prefetch(*run, ids)

    def _is_beyond_memory(self, layer: Layer, outlook: "_Outlook") -> bool:
        """Whether rows may have to come from the disk, and there is memory to keep them in."""
        if self._keeps_rows and outlook.store_version != self._store.version:
            outlook.store_version = self._store.version
            table, disk = self._store.table, len(self._store.tiers) - 1
            outlook.is_beyond_memory = any(
                all(level == disk for level in table[chunk].slots)
                for row in layer.rows
                for chunk in reversed(row[outlook.covered.start : outlook.covered.stop])
            )
        return outlook.is_beyond_memory

    def _attend_row(
        self, layer: Layer, call: AttentionCall, row: int, outlook: "_Outlook"
    ) -> tuple[Tensor, Tensor]:
        """Attend for one row; ``out`` [num_heads, num_queries, value_dim] and ``lse`` of it."""
        layout = self._store.layout
        heads, query = self._heads(layer), call.query[row].float() * call.scale
        num_heads, num_queries, _ = query.shape
        out = query.new_zeros(num_heads, num_queries, layout.value_dim)
        lse = query.new_full((num_heads, num_queries), -torch.inf)
        if not heads:
            return out, lse
        index, run = self._open_row(layer, row, outlook, heads)
        expected = outlook.expected.pop(row, None)
        has_spares = self._is_beyond_memory(layer, outlook)
        groups = (layout.num_kv_heads, num_heads // layout.num_kv_heads, num_queries)
        asked = query.unflatten(0, groups[:2])[list(heads)].to(self._place)
        # A group shares what it reads; the queries of different positions look for other things.
        for position in range(num_queries):
            one = asked[:, :, position]
            hits, likely = self._search(one, index, layer.num_context, has_spares=has_spares)
            self._count(hits, index, expected)
            found = self._attend_heads(one, index, run, hits, likely)
            out.view(*groups, -1)[list(heads), :, position] = found.out.to(out.device)
            lse.view(groups)[list(heads), :, position] = found.lse.to(lse.device)
        return out, lse

    def _open_row(
        self, layer: Layer, row: int, outlook: "_Outlook", heads: tuple[int, ...]
    ) -> tuple[KeyIndex, "_Run"]:
        """Return the index over a row, and the chunks that it covers."""
        assert self._indexes is not None
        queries = self._queries.get((layer.index, row), self._store.layout.num_kv_heads)
        if queries is not None:
            queries = queries[list(heads)]
        holder = Holder(layer.owner, layer.index, row)
        ripe, covered = outlook.ripe, outlook.covered
        chunks = layer.rows[row][ripe.start : ripe.stop]
        index = self._indexes.over(holder, (layer.version, ripe), chunks, heads, queries)
        chunks = layer.rows[row][covered.start : covered.stop]
        assert index.num_tokens == len(chunks) * self._store.layout.chunk_tokens
        version = (layer.version, covered.start, covered.stop)
        return index, _Run(layer.index, (layer.owner, row), version, chunks, heads)

    def _attend_heads(
        self, query: Tensor, index: KeyIndex, run: "_Run", hits: Hits, likely: Tensor
    ) -> Partial:
        """Attend for some KV heads; ``query`` is [len(heads), group_size, key_dim], scaled."""
        assert self._rows is not None
        layout = self._store.layout
        found = self._rows.locate(*run, hits.ids.cpu().numpy(), deadline_s=self._max_wait_s)
        addresses = torch.from_numpy(found).to(query.device)
        if index.tail_takes_values and self.plan.has_tail:
            rows = dispatch.read_rows(addresses, layout.row_dim, layout.dtype).float()
            values = rows[..., layout.key_dim :]
            read = attend_to(query, rows, addresses != 0)
        else:
            values = query.new_empty(*addresses.shape, 0)
            read = dispatch.attend_rows(query, addresses, layout.value_dim, layout.dtype)
        tail = index.tail(query, hits, addresses != 0, values) if self.plan.has_tail else None
        merged = read if tail is None else merge([read, tail])
        self._rows.release()
        if likely is not hits.ids:
            # Late ones first, then those just below the cut.
            self._rows.prefetch(*run, _unread(likely.cpu().numpy(), found))
        drawn = self._check.draw(len(run.heads))
        if drawn is not None:
            answer = Partial(merged.out[drawn], merged.lse[drawn])
            self._check.start(run.heads[drawn], query[drawn], run.chunks, answer)
        return merged

    def _search(
        self, query: Tensor, index: KeyIndex, num_context: int, *, has_spares: bool
    ) -> tuple[Hits, Tensor]:
        """Return what to read, and the ids of that and, if asked for, of the next best tokens."""
        budget, group = self.plan.tokens(num_context), self.plan.group
        if self.plan.error is not None:
            hits = index.search(query, budget, group)
            least = self.plan.error * self._steering.factor
            counts = (index.expected_errors(query, hits)[:, :-1] > least).sum(1)
            chosen = hits.first(counts)
            spared = counts + counts // _SPARE_PART
            return chosen, hits.first(spared).ids if has_spares else chosen.ids
        spare = budget // _SPARE_PART if has_spares else 0
        hits = index.search(query, budget + spare, group)
        chosen = replace(hits, ids=hits.ids[:, :budget])
        return chosen, hits.ids if has_spares else chosen.ids

    def _count(self, hits: Hits, index: KeyIndex, expected: Ints | None) -> None:
        """Count what a search came to, and how much of it had been expected."""
        counters, num_found = self._store.counters, int(hits.found.sum())
        counters.covered_tokens += index.num_tokens * index.num_heads
        counters.retrieved_tokens += num_found
        if isinstance(hits.scanned_bytes, int):
            counters.scanned_bytes += hits.scanned_bytes
        if expected is not None:
            # The last column, which -1 names, stands for no token.
            marks = np.zeros((index.num_heads, index.num_tokens + 1), dtype=np.bool_)
            np.put_along_axis(marks, expected, values=True, axis=1)
            marks[:, -1] = False
            known = np.take_along_axis(marks, hits.ids.cpu().numpy(), axis=1)
            counters.foreseeable_rows += num_found
            counters.foreseen_rows += int(np.count_nonzero(known))

    def _observe(self, error: float) -> None:
        if self.plan.error is not None:
            self._steering.observe(error, self.plan.error)


@dataclass(slots=True)
class _Outlook:
    """What a layer was last asked about, and what it is expected to choose next.

    Attributes
    ----------
    version : int
        Of its rows, then.
    ripe, covered : range
        Chunks; see ``SparsePlan``.
    expected : dict of int to ndarray
        By row of the batch, int64 [len(heads), num_tokens].
    store_version, is_beyond_memory
        Whether, at that version of the store, some of what is covered was on the disk only.
    """

    version: int = -1
    ripe: range = range(0)
    covered: range = range(0)
    expected: dict[int, Ints] = field(default_factory=dict)
    store_version: int = -1
    is_beyond_memory: bool = False

    def follow(self, version: int, ripe: range, covered: range) -> None:
        """Note what is asked about now."""
        if (version, ripe, covered) != (self.version, self.ripe, self.covered):
            self.version, self.ripe, self.covered = version, ripe, covered
            self.store_version = -1


class _Run(NamedTuple):
    """Chunks of one row of a layer, and the heads that are read of them; see ``RowReader``."""

    layer: int
    row_key: tuple[int, int]
    version: Hashable
    chunks: Sequence[ChunkId]
    heads: tuple[int, ...]


def _unread(likely: Ints, addresses: Ints) -> Ints:
    """Return ids without those that have an address, the first ones; -1 in their place."""
    ids = likely.copy()
    ids[:, : addresses.shape[1]][addresses != 0] = NO_TOKEN
    return ids


def _is_plain(call: AttentionCall) -> bool:
    """Whether a query sees every earlier key, with the softmax of its scaled inner product."""
    return call.expand is None and call.softcap is None and call.window is None


def _hidden_tokens(mask: Tensor | None) -> int | None:
    """Return how many first tokens contain all that a mask hides; None if it is no such mask."""
    if mask is None:
        return 0
    if mask.ndim != 2 or mask.dtype != torch.bool:
        return None
    hidden = (~mask).any(0).nonzero()
    return int(hidden[-1]) + 1 if len(hidden) else 0
