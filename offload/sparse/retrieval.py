"""Sparse attention: search an index, read the tokens it names, estimate the others."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from offload.exact import AttentionCall
from offload.index.base import Hits, KeyIndex
from offload.kernels import dispatch
from offload.kernels.reference import merge
from offload.sparse.indexes import Holder, LayerIndexes
from offload.sparse.plan import SparsePlan
from offload.sparse.queries import QuerySample
from offload.sparse.row_reader import RowReader
from offload.sparse.self_check import ErrorStats, SelfCheck
from offload.sparse.steering import ErrorSteering
from offload.store import ChunkStore
from offload.types import ChunkId, Partial


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
        self._max_wait_s = max_wait_s
        self._device = device
        self._place = torch.device("cpu") if plan.placement == "host" else device
        self._indexes = (
            None if plan.index is None else LayerIndexes(store, self._place, plan.index, plan.sizes)
        )
        self._queries = QuerySample(plan.kept_queries)
        self._steering = ErrorSteering()
        self._check = SelfCheck(store, plan.check_every, self._observe)

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
        if not covered or self._indexes is None:
            positions = call.query.shape[2] * len(layer.rows)
            self._store.counters.covered_tokens += (
                len(covered) * size * self._store.layout.num_kv_heads * positions
            )
            return [], covered
        parts = [
            self._attend_row(layer, call, row, ripe, covered) for row in range(len(layer.rows))
        ]
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

    def _attend_row(
        self, layer: Layer, call: AttentionCall, row: int, ripe: range, covered: range
    ) -> tuple[Tensor, Tensor]:
        """Attend for one row; ``out`` [num_heads, num_queries, value_dim] and ``lse`` of it."""
        layout = self._store.layout
        heads, query = self._heads(layer), call.query[row].float() * call.scale
        num_heads, num_queries, _ = query.shape
        out = query.new_zeros(num_heads, num_queries, layout.value_dim)
        lse = query.new_full((num_heads, num_queries), -torch.inf)
        if not heads:
            return out, lse
        index = self._index(layer, row, ripe, heads)
        chunks = layer.rows[row][covered.start : covered.stop]
        assert index.num_tokens == len(chunks) * layout.chunk_tokens
        version = (layer.version, covered.start, covered.stop)
        run = _Run(layer.index, (layer.owner, row), version, chunks, heads)
        groups = (layout.num_kv_heads, num_heads // layout.num_kv_heads, num_queries)
        asked = query.unflatten(0, groups[:2])[list(heads)].to(self._place)
        # A group shares what it reads; the queries of different positions look for other things.
        for position in range(num_queries):
            one = asked[:, :, position]
            found = self._attend_heads(one, index, run, layer.num_context)
            out.view(*groups, -1)[list(heads), :, position] = found.out.to(out.device)
            lse.view(groups)[list(heads), :, position] = found.lse.to(lse.device)
        return out, lse

    def _index(self, layer: Layer, row: int, ripe: range, heads: tuple[int, ...]) -> KeyIndex:
        assert self._indexes is not None
        queries = self._queries.get((layer.index, row), self._store.layout.num_kv_heads)
        if queries is not None:
            queries = queries[list(heads)]
        holder = Holder(layer.owner, layer.index, row)
        chunks = layer.rows[row][ripe.start : ripe.stop]
        return self._indexes.over(holder, (layer.version, ripe), chunks, heads, queries)

    def _attend_heads(
        self, query: Tensor, index: KeyIndex, run: "_Run", num_context: int
    ) -> Partial:
        """Attend for some KV heads; ``query`` is [len(heads), group_size, key_dim], scaled."""
        assert self._rows is not None
        hits, layout = self._search(query, index, num_context), self._store.layout
        addresses = torch.from_numpy(
            self._rows.locate(*run, hits.ids.cpu().numpy(), deadline_s=self._max_wait_s)
        ).to(query.device)
        if index.tail_takes_values and self.plan.has_tail:
            rows = dispatch.read_rows(addresses, layout.row_dim, layout.dtype).float()
            keys, values = rows.split([layout.key_dim, layout.value_dim], -1)
            read = _attend_rows(query, keys, values, addresses != 0)
        else:
            values = query.new_empty(*addresses.shape, 0)
            read = dispatch.attend_rows(query, addresses, layout.value_dim, layout.dtype)
        tail = index.tail(query, hits, addresses != 0, values) if self.plan.has_tail else None
        merged = read if tail is None else merge([read, tail])
        self._rows.release()
        drawn = self._check.draw(len(run.heads))
        if drawn is not None:
            found = Partial(merged.out[drawn], merged.lse[drawn])
            self._check.start(run.heads[drawn], query[drawn], run.chunks, found)
        return merged

    def _search(self, query: Tensor, index: KeyIndex, num_context: int) -> Hits:
        hits = index.search(query, self.plan.tokens(num_context), self.plan.group)
        if self.plan.error is not None:
            least = self.plan.error * self._steering.factor
            errors = index.expected_errors(query, hits)[:, :-1]
            hits = hits.first((errors > least).sum(1))
        counters = self._store.counters
        counters.covered_tokens += index.num_tokens * index.num_heads
        counters.retrieved_tokens += int(hits.found.sum())
        return hits

    def _observe(self, error: float) -> None:
        if self.plan.error is not None:
            self._steering.observe(error, self.plan.error)


class _Run(NamedTuple):
    """Chunks of one row of a layer, and the heads that are read of them; see ``RowReader``."""

    layer: int
    row_key: tuple[int, int]
    version: Hashable
    chunks: Sequence[ChunkId]
    heads: tuple[int, ...]


def _attend_rows(query: Tensor, keys: Tensor, values: Tensor, found: Tensor) -> Partial:
    logits = torch.bmm(query, keys.mT).masked_fill(~found.unsqueeze(1), -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
    return Partial(torch.bmm(weights, values), lse)


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
