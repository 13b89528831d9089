"""Heavy hitters: the tokens that past queries attended to most, whatever is asked now.

H2O (arXiv 2306.14048, section 4) sums the attention that each token received and evicts the lowest;
here the same score says what is read, and nothing is lost. The sums are over the queries that were
kept of the prompt, or, without any, over the last keys of each segment, which stand in for them as
in the observation window of SnapKV (arXiv 2404.14469). They are taken once, when the tokens are
indexed: tokens that a later query would have needed are not found, which is what indexes that look
at the query are for. What is not read is forgotten, as in both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from offload.index.base import Combine, Hits, KeyIndex, require_finite

_WINDOW = 64
"""Last keys of a segment that stand in for queries."""

_BLOCK_QUERIES = 64
"""Bounds the workspace at 2 MiB for each 8K tokens of a head."""


@dataclass(frozen=True, slots=True)
class HeavyIndex(KeyIndex):
    """The attention that each token received.

    Attributes
    ----------
    scores : Tensor, shape (num_heads, num_tokens), float32
        Sums of shares of the softmax over the tokens of a segment, per query.
    """

    learns_from_queries = True

    scores: Tensor

    @classmethod
    def build(cls, keys: Tensor, values: Tensor, *, queries: Tensor | None = None) -> Self:
        """Sum the attention to a run of keys.

        Parameters
        ----------
        keys, values : Tensor
            As ``KeyIndex.build`` says.
        queries : Tensor, shape (num_heads, num_queries, key_dim), optional
            Of the prompt, not scaled.

        Raises
        ------
        ConfigError
            A key or value is not finite.
        """
        require_finite(keys, values)
        asked = keys[:, -_WINDOW:] if queries is None else queries
        wide, scale = keys.float(), keys.shape[2] ** -0.5
        scores = wide.new_zeros(keys.shape[:2])
        for block in asked.float().split(_BLOCK_QUERIES, 1):
            scores += torch.bmm(block * scale, wide.mT).softmax(-1).sum(1)
        return cls(scores / asked.shape[1])

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:  # noqa: D102
        return cls(torch.cat([part.scores for part in parts], 1))

    def prefix(self, num_tokens: int) -> Self:  # noqa: D102
        return type(self)(self.scores[:, :num_tokens])

    @property
    def num_heads(self) -> int:  # noqa: D102
        return self.scores.shape[0]

    @property
    def num_tokens(self) -> int:  # noqa: D102
        return self.scores.shape[1]

    def tensors(self) -> Mapping[str, Tensor]:  # noqa: D102
        return {"scores": self.scores}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:  # noqa: D102
        return cls(tensors["scores"])

    def search(  # noqa: D102
        self, query: Tensor, budget: int, group: Combine = "max", past: Hits | None = None
    ) -> Hits:
        best = self.scores.topk(min(budget, self.num_tokens), 1)
        return Hits(best.indices, self.scores.nbytes)
