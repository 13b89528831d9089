"""One key that stands for a chunk: the mean of its keys, or of its most representative ones.

ReKV (arXiv 2503.00540) scores a video frame by the mean of its keys; its paper says cosine, its
code takes the dot product, so both are offered. InfLLM (arXiv 2402.04617, section 3.2) sums the dot
products with the few keys of a block that the queries after it attended to most; that is the dot
product with their mean, so the mean is what is kept. There are no queries here when a chunk is
summarised, and its own keys stand in for them: the representatives are the keys with the largest
dot product with the sum of all.

Both average the queries, of a question or of all heads, before they score; here each query scores
the chunks by itself and a chunk has the largest share of the softmax that any query of the group
gives it. The unit is 16 tokens rather than a frame of 196 or a block of 128; keys have their rotary
embedding. Whole chunks are taken, the last one cut so as to keep the budget; what is not read is
forgotten, as in both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import normalize

from offload.index.base import Combine, Hits, KeyIndex, agreed, combine_group, require_finite
from offload.index.chunks import Chunking, best_tokens, per_chunk


@dataclass(frozen=True, slots=True)
class MeanIndex(KeyIndex):
    """A mean key for each chunk.

    Attributes
    ----------
    means : Tensor, shape (num_heads, num_chunks, key_dim)
        In the dtype of the keys.
    chunking : Chunking
    is_cosine : bool
        Score by the cosine; else by the dot product.
    representatives : int or None
        Keys of a chunk that its mean is over; None: all.
    """

    means: Tensor
    chunking: Chunking
    is_cosine: bool
    representatives: int | None

    @classmethod
    def build(  # noqa: D102
        cls,
        keys: Tensor,
        values: Tensor,
        *,
        chunk_tokens: int = 16,
        is_cosine: bool = False,
        representatives: int | None = None,
    ) -> Self:
        require_finite(keys, values)

        def summarise(chunks: Tensor) -> Tensor:
            return _mean_key(chunks.float(), representatives).to(keys.dtype)

        means = per_chunk(keys, chunk_tokens, summarise)
        return cls(means, Chunking(chunk_tokens, (keys.shape[1],)), is_cosine, representatives)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:  # noqa: D102
        return cls(
            torch.cat([part.means for part in parts], 1),
            Chunking.join([part.chunking for part in parts]),
            *agreed([(part.is_cosine, part.representatives) for part in parts]),
        )

    def prefix(self, num_tokens: int) -> Self:  # noqa: D102
        chunking = self.chunking.prefix(num_tokens)
        return replace(self, means=self.means[:, : chunking.num_chunks], chunking=chunking)

    @property
    def num_heads(self) -> int:  # noqa: D102
        return self.means.shape[0]

    @property
    def num_tokens(self) -> int:  # noqa: D102
        return self.chunking.num_tokens

    def tensors(self) -> Mapping[str, Tensor]:  # noqa: D102
        return {"means": self.means}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {
            "chunk_tokens": self.chunking.chunk_tokens,
            "runs": self.chunking.runs,
            "is_cosine": self.is_cosine,
            "representatives": self.representatives,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:  # noqa: D102
        chunking = Chunking(meta["chunk_tokens"], tuple(meta["runs"]))
        return cls(tensors["means"], chunking, meta["is_cosine"], meta["representatives"])

    def search(  # noqa: D102
        self, query: Tensor, budget: int, group: Combine = "max", past: Hits | None = None
    ) -> Hits:
        means = self.means.float()
        if self.is_cosine:
            query, means = normalize(query, dim=-1), normalize(means, dim=-1)
        scores = combine_group(torch.bmm(query, means.mT), group)
        ids = best_tokens(scores, self.chunking.lengths(query.device), budget)
        return Hits(ids, self.means.nbytes)


def _mean_key(chunks: Tensor, representatives: int | None) -> Tensor:
    """Return the mean of all keys of each chunk, or of so many of them."""
    means = chunks.mean(2)
    if representatives is None or representatives >= chunks.shape[2]:
        return means
    likeness = torch.einsum("hctd,hcd->hct", chunks, means)
    best = likeness.topk(representatives, 2).indices
    return chunks.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, chunks.shape[-1])).mean(2)
