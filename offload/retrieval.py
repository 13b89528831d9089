"""Sparse attention: search an index, read the tokens it names, estimate the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.exact import AttentionCall
from offload.gather import gather_tokens
from offload.index.base import KeyIndex
from offload.kernels.reference import merge
from offload.layer_index import LayerIndexes
from offload.self_check import ErrorStats, SelfCheck
from offload.sparse_plan import SparsePlan
from offload.store import ChunkStore
from offload.types import ChunkId, Partial


class Retrieval:
    """Sparse attention over one store, for all layers and forks.

    Only the thread that holds the engine's lock calls methods.

    Parameters
    ----------
    store : ChunkStore
    device : torch.device
        Of the model.
    plan : SparsePlan
    """

    def __init__(self, store: ChunkStore, device: torch.device, plan: SparsePlan) -> None:
        self.plan = plan
        self._store = store
        self._device = device
        self._indexes = LayerIndexes(store, device, plan.build, plan.sizes)
        self._check = SelfCheck(store, plan.check_every)

    @property
    def index_bytes(self) -> int:
        """Bytes of the indexes."""
        return self._indexes.num_bytes

    @property
    def errors(self) -> ErrorStats:
        """How far off the answers were that were checked."""
        return self._check.stats()

    def close(self) -> None:
        """Stop checking. Idempotent."""
        self._check.close()

    def covered(self, layer_number: int, call: AttentionCall, num_chunks: int) -> range:
        """Return the chunks that may be read sparsely; empty if the call needs all of them.

        Parameters
        ----------
        layer_number : int
            Counted over the offloaded layers.
        call : AttentionCall
        num_chunks : int
            Full chunks before the queries.
        """
        size, plan = self._store.layout.chunk_tokens, self.plan
        needs_all = (
            layer_number < plan.dense_layers
            or call.query.shape[2] > plan.max_queries
            or call.expand is not None
            or call.softcap is not None
            or call.window is not None
            or (call.mask is not None and not _hides_nothing(call.mask))
        )
        first = -(-plan.sink_tokens // size)
        last = num_chunks - -(-plan.window_tokens // size)
        if needs_all or last <= first:
            return range(0)
        cuts = plan.sizes.cut(last - first, size)
        return range(first, first + cuts[-1][1]) if cuts else range(0)

    def attend(
        self, call: AttentionCall, rows: Sequence[Sequence[ChunkId]], covered: range, context: int
    ) -> Partial:
        """Attend to the covered chunks of every row.

        Parameters
        ----------
        call : AttentionCall
        rows : sequence of sequence of ChunkId
        covered : range
            From ``covered``.
        context : int
            Tokens that the last query sees, for the budget.
        """
        parts = []
        for number, row in enumerate(rows):
            chunks = row[covered.start : covered.stop]
            index, num_indexed = self._indexes.over(chunks)
            assert index is not None
            assert num_indexed == len(chunks)
            query = call.query[number]
            parts.append(self._attend_row(query, call.scale, index, chunks, context))
        return Partial(torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts]))

    def _attend_row(
        self,
        query: Tensor,
        scale: float,
        index: KeyIndex,
        chunks: Sequence[ChunkId],
        context: int,
    ) -> Partial:
        """Attend for one row; ``query`` is [num_heads, num_queries, key_dim]."""
        layout = self._store.layout
        num_heads, num_queries, key_dim = query.shape
        grouped = query.reshape(layout.num_kv_heads, -1, key_dim).float() * scale
        hits = index.search(grouped, self.plan.tokens(context))
        counters = self._store.counters
        counters.covered_tokens += index.num_tokens * index.num_heads
        counters.retrieved_tokens += int(hits.found.sum())
        rows = gather_tokens(self._store, self._device, chunks, hits.ids.cpu()).float()
        keys, values = rows[..., :key_dim], rows[..., key_dim:]
        logits = torch.bmm(grouped, keys.transpose(1, 2))
        logits = logits.masked_fill(~hits.found.unsqueeze(1), -torch.inf)
        lse = logits.logsumexp(-1)
        weights = (logits - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
        parts = [Partial(torch.bmm(weights, values), lse)]
        if self.plan.has_tail:
            tail = index.tail(grouped, hits, hits.found, values)
            parts += [] if tail is None else [tail]
        merged = merge(parts) if len(parts) > 1 else parts[0]
        head = self._check.draw(layout.num_kv_heads)
        if head is not None:
            found = Partial(merged.out[head], merged.lse[head])
            self._check.start(head, grouped[head], chunks, found)
        shape = (num_heads, num_queries)
        return Partial(merged.out.reshape(*shape, -1), merged.lse.reshape(shape))


def _hides_nothing(mask: Tensor) -> bool:
    return mask.ndim == 2 and mask.dtype == torch.bool and bool(mask.all())
