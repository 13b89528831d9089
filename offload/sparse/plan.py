"""What a sparse preset reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from offload.index.base import Combine, KeyIndex
from offload.sparse.segments import SegmentSizes


@dataclass(frozen=True, slots=True)
class IndexRecipe:
    """How an index is built.

    Attributes
    ----------
    kind : type
    options : mapping
        For ``kind.build``.
    """

    kind: type[KeyIndex]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> KeyIndex:
        """Index keys and values.

        Parameters
        ----------
        keys, values : Tensor, shape (num_heads, num_tokens, dim)
        queries : Tensor or None, shape (num_heads, num_queries, key_dim)
            Such as will be asked.
        """
        extra = {"queries": queries} if self.kind.learns_from_queries else {}
        return self.kind.build(keys, values, **extra, **self.options)


@dataclass(frozen=True, slots=True)
class EarlyLayers:
    """What the first layers do otherwise than the others.

    Attributes
    ----------
    num_layers : int
        From the first one that is offloaded.
    index : IndexRecipe
    budget : float or int
        As that of the plan; they read no less than the others do.
    """

    num_layers: int
    index: IndexRecipe
    budget: float | int


StreamingHeads = tuple[tuple[bool, ...], ...]
"""Of each layer of the model and KV head: whether it attends to sinks and window only."""


@dataclass(frozen=True, slots=True)
class SparsePlan:
    """What a preset reads.

    Attributes
    ----------
    index : IndexRecipe or None
        None: nothing is read but sinks and window, which the budget is then the
        size of.
    budget : float or int
        Tokens read per query and KV head, besides sinks and window: a share of the context if it is
        a float, else a number of tokens.
    early : EarlyLayers or None
        First layers with an index and a budget of their own.
    abstracts : {"ram", "disk"}
        Where indexes lie: in memory, or in files that are mapped into it, of which the system keeps
        what there is room for.
    error : float or None
        Read no more than what keeps the relative error of nine in ten answers below this; the
        budget is then the most that is read.
    sink_tokens, window_tokens : int
        First and last tokens, always attended; whole chunks are.
    dense_layers : int
        Layers from the first that read everything.
    dense_below : int or "auto"
        Tokens of context below which all layers read everything; ``"auto"``: measured, see
        ``BreakEven``.
    streaming_heads : StreamingHeads or None
        Heads that are neither indexed nor read. Layers beyond its length have none.
    group : {"max", "sum"}
        How the queries of a group agree on what to read.
    max_queries : int
        A call with more queries is a prefill, which reads everything.
    has_tail : bool
        Estimate what is not read, where the index can.
    sizes : SegmentSizes
    placement : {"device", "host"}
        Where indexes live and attention to what they find is computed. From the host only its
        result moves to the device.
    kept_queries : int
        Queries of the prefill, per layer and row, that are kept for building indexes.
    check_every : int
        Calls, on average, of which one KV head is compared with exact attention.
    """

    index: IndexRecipe | None
    budget: float | int = 0.01
    early: EarlyLayers | None = None
    abstracts: Literal["ram", "disk"] = "ram"
    error: float | None = None
    sink_tokens: int = 4
    window_tokens: int = 64
    dense_layers: int = 0
    dense_below: int | Literal["auto"] = 0
    streaming_heads: StreamingHeads | None = None
    group: Combine = "max"
    max_queries: int = 64
    has_tail: bool = True
    sizes: SegmentSizes = field(default_factory=SegmentSizes)
    placement: Literal["device", "host"] = "device"
    kept_queries: int = 0
    check_every: int = 256

    def recipe(self, layer: int) -> IndexRecipe | None:
        """Return how the keys of a layer, counted among those offloaded, are indexed."""
        if self.early is not None and layer < self.early.num_layers:
            return self.early.index
        return self.index

    def tokens(self, num_context: int, layer: int | None = None) -> int:
        """Return how many tokens a layer, counted alike, reads of a context of so many.

        By default one that is not among the early ones.
        """
        own = _tokens(self.budget, num_context)
        if self.early is not None and layer is not None and layer < self.early.num_layers:
            return max(own, _tokens(self.early.budget, num_context))
        return own

    def window(self, num_context: int) -> int:
        """Return how many of the last tokens of such a context are always attended."""
        if self.index is not None:
            return self.window_tokens
        return max(self.window_tokens, _tokens(self.budget, num_context))

    def ripe(self, num_chunks: int, chunk_tokens: int, num_context: int, hidden: int) -> range:
        """Return the chunks between sinks and window.

        Parameters
        ----------
        num_chunks : int
            Full chunks before the queries.
        chunk_tokens : int
        num_context : int
            Tokens that the last query sees.
        hidden : int
            First tokens of which some are hidden (padding); their chunks are not among the result.
        """
        first = -(-max(self.sink_tokens, hidden) // chunk_tokens)
        return range(first, max(first, num_chunks - -(-self.window(num_context) // chunk_tokens)))

    def covered(self, ripe: range, chunk_tokens: int) -> range:
        """Return those of the ripe chunks that are in segments, and so may be read sparsely."""
        if self.index is None:
            return ripe
        cuts = self.sizes.cut(len(ripe), chunk_tokens)
        return range(ripe.start, ripe.start + (cuts[-1][1] if cuts else 0))

    def heads(self, layer: int, num_kv_heads: int) -> tuple[int, ...]:
        """Return the KV heads of a layer of the model that are read."""
        pattern = self.streaming_heads
        if pattern is None or layer >= len(pattern):
            return tuple(range(num_kv_heads))
        return tuple(head for head, streams in enumerate(pattern[layer]) if not streams)


def _tokens(budget: float | int, num_context: int) -> int:
    return max(1, budget if isinstance(budget, int) else int(budget * num_context))
