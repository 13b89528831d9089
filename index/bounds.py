"""The box that each chunk's keys lie in, and from it the largest logit any of them can have.

Quest (arXiv 2406.10774, section 3.2) with pages of 16 tokens, and the bound of LeoAM's abstracts:
``q+ . max + q- . min``. Unlike Quest, which selects for every query head by itself, the queries of
a group share what is read: a chunk's score is the largest share of the softmax over the chunks'
bounds that any query gives it. Whole chunks are taken, the last one cut so as to keep the budget.
What is not read is forgotten, as in both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from offload.index.base import Combine, Hits, KeyIndex, combine_group, require_finite
from offload.index.chunks import Chunking, best_tokens, per_chunk


@dataclass(frozen=True, slots=True)
class BoundsIndex(KeyIndex):
    """Smallest and largest key of each chunk, channel by channel.

    Attributes
    ----------
    lower, upper : Tensor, shape (num_heads, num_chunks, key_dim)
        In the dtype of the keys, so that they bound them exactly.
    chunking : Chunking
    """

    is_abstract = True

    lower: Tensor
    upper: Tensor
    chunking: Chunking

    @classmethod
    def build(cls, keys: Tensor, values: Tensor, *, chunk_tokens: int = 16) -> Self:  # noqa: D102
        require_finite(keys, values)
        return cls(
            per_chunk(keys, chunk_tokens, lambda chunks: chunks.amin(2)),
            per_chunk(keys, chunk_tokens, lambda chunks: chunks.amax(2)),
            Chunking(chunk_tokens, (keys.shape[1],)),
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:  # noqa: D102
        return cls(
            torch.cat([part.lower for part in parts], 1),
            torch.cat([part.upper for part in parts], 1),
            Chunking.join([part.chunking for part in parts]),
        )

    def prefix(self, num_tokens: int) -> Self:  # noqa: D102
        chunking = self.chunking.prefix(num_tokens)
        count = chunking.num_chunks
        return type(self)(self.lower[:, :count], self.upper[:, :count], chunking)

    @property
    def num_heads(self) -> int:  # noqa: D102
        return self.lower.shape[0]

    @property
    def num_tokens(self) -> int:  # noqa: D102
        return self.chunking.num_tokens

    def tensors(self) -> Mapping[str, Tensor]:  # noqa: D102
        return {"lower": self.lower, "upper": self.upper}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"chunk_tokens": self.chunking.chunk_tokens, "runs": self.chunking.runs}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:  # noqa: D102
        chunking = Chunking(meta["chunk_tokens"], tuple(meta["runs"]))
        return cls(tensors["lower"], tensors["upper"], chunking)

    def bounds(self, query: Tensor) -> Tensor:
        """Return what no logit of a chunk exceeds, ``[num_heads, num_queries, num_chunks]``.

        Parameters
        ----------
        query : Tensor, shape (num_heads, num_queries, key_dim), float32
        """
        positive = torch.bmm(query.clamp_min(0), self.upper.float().mT)
        return torch.baddbmm(positive, query.clamp_max(0), self.lower.float().mT)

    def search(  # noqa: D102
        self, query: Tensor, budget: int, group: Combine = "max", past: Hits | None = None
    ) -> Hits:
        scores = combine_group(self.bounds(query), group)
        ids = best_tokens(scores, self.chunking.lengths(query.device), budget)
        return Hits(ids, self.lower.nbytes + self.upper.nbytes)
