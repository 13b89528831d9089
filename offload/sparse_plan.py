"""What a sparse preset reads."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from offload.index.base import KeyIndex

BuildIndex = Callable[[Tensor, Tensor], KeyIndex]
"""Index keys and values, each ``[num_kv_heads, num_tokens, dim]``."""


@dataclass(frozen=True, slots=True)
class SegmentSizes:
    """How a run of chunks is cut into segments.

    Attributes
    ----------
    large_tokens, small_tokens : int
        Segments of the first size as long as they fit, then of the second. What is left is not
        indexed. A small one is dropped when the large one that contains it is complete, so that an
        index which grew is the same as one that was built at once.
    """

    large_tokens: int = 8192
    small_tokens: int = 1024

    def cut(self, num_chunks: int, chunk_tokens: int) -> list[tuple[int, int]]:
        """Return start and stop, in chunks, of each segment of so many chunks."""
        cuts: list[tuple[int, int]] = []
        start = 0
        for tokens in (self.large_tokens, self.small_tokens):
            step = max(1, tokens // chunk_tokens)
            while start + step <= num_chunks:
                cuts.append((start, start + step))
                start += step
        return cuts


@dataclass(frozen=True, slots=True)
class SparsePlan:
    """What a preset reads.

    Attributes
    ----------
    build : callable
        Makes an index from keys and values.
    budget : float or int
        Tokens read per query and KV head, besides sinks and window: a share of the context below
        one, else a number of tokens.
    sink_tokens, window_tokens : int
        First and last tokens, always attended; whole chunks are.
    dense_layers : int
        Layers from the first that read everything.
    max_queries : int
        A call with more queries is a prefill, which reads everything.
    has_tail : bool
        Estimate what is not read, where the index can.
    sizes : SegmentSizes
    check_every : int
        Calls, on average, of which one KV head is compared with exact attention.
    """

    build: BuildIndex
    budget: float | int = 0.01
    sink_tokens: int = 4
    window_tokens: int = 64
    dense_layers: int = 0
    max_queries: int = 64
    has_tail: bool = True
    sizes: SegmentSizes = field(default_factory=SegmentSizes)
    check_every: int = 256

    def tokens(self, num_context: int) -> int:
        """Return how many tokens to read of a context of so many."""
        if isinstance(self.budget, int):
            return max(1, self.budget)
        return max(1, int(self.budget * num_context))
