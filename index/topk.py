"""The oracle: every key is scored exactly, and the best are taken one by one.

No system can choose better tokens for one query, so this is what the others are measured against;
with ``renormalised`` it is what most of them would be with a perfect index (RetrievalAttention,
Quest, InfLLM and ParisKV attend to what they retrieve and forget the rest). Otherwise what was not
read is estimated too: its weights are known exactly, its values by the mean of each chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from offload.index.base import Combine, Hits, KeyIndex, agreed, combine_group, require_finite
from offload.index.chunks import Chunking, per_chunk
from offload.index.rest import remaining
from offload.types import Partial

_BLOCK_TOKENS = 8192
"""Keys converted to float32 at a time; bounds the workspace at 4 MiB per head of 128."""


@dataclass(frozen=True, slots=True)
class TopKIndex(KeyIndex):
    """All keys as they are.

    Attributes
    ----------
    keys : Tensor, shape (num_heads, num_tokens, key_dim)
        A copy, in the dtype given.
    value_means : Tensor, shape (num_heads, num_chunks, value_dim), float32
    chunking : Chunking
    renormalised : bool
        Whether what is not read is left out of the softmax instead of being estimated.
    """

    tail_takes_values = True

    keys: Tensor
    value_means: Tensor
    chunking: Chunking
    renormalised: bool

    @classmethod
    def build(  # noqa: D102
        cls, keys: Tensor, values: Tensor, *, chunk_tokens: int = 64, renormalised: bool = False
    ) -> Self:
        require_finite(keys, values)
        chunking = Chunking(chunk_tokens, (keys.shape[1],))
        means = per_chunk(values, chunk_tokens, lambda chunks: chunks.float().mean(2))
        keys = keys.clone(memory_format=torch.contiguous_format)
        return cls(keys, means, chunking, renormalised)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:  # noqa: D102
        return cls(
            torch.cat([part.keys for part in parts], 1),
            torch.cat([part.value_means for part in parts], 1),
            Chunking.join([part.chunking for part in parts]),
            agreed([part.renormalised for part in parts]),
        )

    def prefix(self, num_tokens: int) -> Self:  # noqa: D102
        chunking = self.chunking.prefix(num_tokens)
        means = self.value_means[:, : chunking.num_chunks]
        return replace(self, keys=self.keys[:, :num_tokens], value_means=means, chunking=chunking)

    @property
    def num_heads(self) -> int:  # noqa: D102
        return self.keys.shape[0]

    @property
    def num_tokens(self) -> int:  # noqa: D102
        return self.keys.shape[1]

    def tensors(self) -> Mapping[str, Tensor]:  # noqa: D102
        return {"keys": self.keys, "value_means": self.value_means}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {
            "chunk_tokens": self.chunking.chunk_tokens,
            "runs": self.chunking.runs,
            "renormalised": self.renormalised,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:  # noqa: D102
        chunking = Chunking(meta["chunk_tokens"], tuple(meta["runs"]))
        return cls(tensors["keys"], tensors["value_means"], chunking, meta["renormalised"])

    def search(  # noqa: D102
        self, query: Tensor, budget: int, group: Combine = "max", past: Hits | None = None
    ) -> Hits:
        blocks = self.keys.split(_BLOCK_TOKENS, 1)
        logits = torch.cat([torch.bmm(query, block.float().mT) for block in blocks], 2)
        best = combine_group(logits, group).topk(min(budget, self.num_tokens), 1)
        return Hits(best.indices, self.keys.nbytes, logits)

    def tail(self, query: Tensor, hits: Hits, have: Tensor, values: Tensor) -> Partial | None:  # noqa: D102
        if self.renormalised:
            return None
        logits = hits.state
        assert isinstance(logits, Tensor)
        places = torch.where(have & hits.found, hits.ids, self.num_tokens)
        read = torch.zeros(self.num_heads, self.num_tokens + 1, dtype=torch.bool).to(query.device)
        read = read.scatter_(1, places, value=True)[:, :-1]
        logits = logits.masked_fill(read.unsqueeze(1), -torch.inf)
        lse = logits.logsumexp(-1)
        shares = (logits - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
        lengths = self.chunking.lengths(query.device)
        chunk_of = torch.arange(len(lengths), device=query.device).repeat_interleave(lengths)
        weights = shares.new_zeros(*shares.shape[:2], len(lengths)).index_add_(2, chunk_of, shares)
        counts = lengths.expand(self.num_heads, -1)
        of_hits = chunk_of[hits.ids.clamp_min(0)]
        _, means = remaining(counts, self.value_means, of_hits, hits, have, values)
        return Partial(torch.bmm(weights, means), lse)
