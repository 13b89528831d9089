"""Off-the-shelf vector indexes of FAISS, one per KV head.

RetrievalAttention (arXiv 2409.10516, section 2.4) shows what these miss when queries lie elsewhere
than keys; ``projection`` is its answer, these are what it is measured against. For key caches the
inverted files are of use by themselves: they are built fast and grow by segments.

FAISS works on the CPU in float32, also if the installed package is faiss-gpu. ``ivf`` and ``hnsw``
hold all keys, twice as large as in half precision; the others hold codes only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, islice
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from offload.index.base import Combine, Hits, KeyIndex, agreed, require_finite
from offload.index.candidates import best_of_group
from offload.index.faiss_bridge import Workers, faiss_module, from_bytes, shared_workers
from offload.index.faiss_kinds import AnnSettings, HeadIndex, Nearest, build_head


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    """The indexes of all heads over one run of tokens."""

    num_tokens: int
    heads: tuple[HeadIndex, ...]


@dataclass(frozen=True, slots=True, eq=False)
class AnnIndex(KeyIndex):
    """A FAISS index per head and segment; what the segments find is ranked together.

    Searches run in parallel over heads and segments.

    Attributes
    ----------
    settings : AnnSettings
    segments : tuple
        Of consecutive tokens.
    """

    settings: AnnSettings
    segments: tuple[_Segment, ...]
    _workers: Workers = field(default_factory=shared_workers, repr=False)

    @classmethod
    def build(cls, keys: Tensor, values: Tensor, **options: Any) -> Self:
        """Index a run of tokens.

        Parameters
        ----------
        keys, values : Tensor
            As ``KeyIndex.build`` says.
        **options
            Of ``AnnSettings``.

        Raises
        ------
        ConfigError
            A key or value is not finite; an option is none; FAISS is not installed.
        """
        faiss_module()
        settings = AnnSettings(**options)
        require_finite(keys, values)
        workers = shared_workers()
        build = partial(build_head, settings=settings)
        segments = []
        for part in keys.split(settings.segment_tokens, 1):
            heads = workers.map(build, part.float().cpu().contiguous().numpy())
            segments.append(_Segment(part.shape[1], tuple(heads)))
        return cls(settings, tuple(segments))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:  # noqa: D102
        settings = agreed([part.settings for part in parts])
        return cls(settings, tuple(segment for part in parts for segment in part.segments))

    def prefix(self, num_tokens: int) -> Self:  # noqa: D102
        stops = list(accumulate(segment.num_tokens for segment in self.segments))
        return type(self)(self.settings, self.segments[: stops.index(num_tokens) + 1])

    @property
    def num_heads(self) -> int:  # noqa: D102
        return len(self.segments[0].heads)

    @property
    def num_tokens(self) -> int:  # noqa: D102
        return sum(segment.num_tokens for segment in self.segments)

    @property
    def num_bytes(self) -> int:  # noqa: D102
        return sum(head.num_bytes for segment in self.segments for head in segment.heads)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the indexes as FAISS serialises them, one after the other; made at every call."""
        blobs = [head.to_bytes() for segment in self.segments for head in segment.heads]
        return {"indexes": torch.cat(blobs)}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {
            "settings": asdict(self.settings),
            "segments": [
                [segment.num_tokens, [head.num_bytes for head in segment.heads]]
                for segment in self.segments
            ],
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Return the index that these came from; FAISS copies what it needs of the tensors."""
        settings = AnnSettings(**meta["settings"])
        blobs = iter(tensors["indexes"].split([n for _, sizes in meta["segments"] for n in sizes]))
        segments = [
            _Segment(
                num_tokens,
                tuple(HeadIndex(from_bytes(blob)) for blob in islice(blobs, len(sizes))),
            )
            for num_tokens, sizes in meta["segments"]
        ]
        return cls(settings, tuple(segments))

    def search(  # noqa: D102
        self, query: Tensor, budget: int, group: Combine = "max", past: Hits | None = None
    ) -> Hits:
        if budget >= self.num_tokens:
            everything = torch.arange(self.num_tokens, device=query.device)
            return Hits(everything.repeat(self.num_heads, 1), 0)
        if budget == 0:
            return Hits(torch.empty(self.num_heads, 0, dtype=torch.int64, device=query.device), 0)
        rows = query.float().cpu().contiguous().numpy()
        searches = [
            self._workers.submit(head.search, row, min(budget, segment.num_tokens), self.settings)
            for segment in self.segments
            for head, row in zip(segment.heads, rows, strict=True)
        ]
        found = [search.result() for search in searches]
        parts, first = [], 0
        for number, segment in enumerate(self.segments):
            own = found[number * self.num_heads : (number + 1) * self.num_heads]
            parts.append(_shifted(own, first))
            first += segment.num_tokens
        ids, scores = (torch.cat(tensors, 2) for tensors in zip(*parts, strict=True))
        best = best_of_group(ids, scores, budget, group)
        return Hits(best.to(query.device), sum(nearest.scanned_bytes for nearest in found))


def _shifted(heads: Sequence[Nearest], first: int) -> tuple[Tensor, Tensor]:
    """Return ids, counted from the first of the index, and scores of all heads of a segment."""
    ids = torch.from_numpy(np.stack([nearest.ids for nearest in heads]))
    scores = torch.from_numpy(np.stack([nearest.scores for nearest in heads]))
    return torch.where(ids >= 0, ids + first, ids), scores
