"""Indexes over the chunks of a layer, built from what is stored."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from offload.index.base import KeyIndex
from offload.sparse.builder import IndexBuilder, Job, Segment
from offload.sparse.plan import IndexRecipe
from offload.sparse.segments import SegmentSizes
from offload.sparse.spill import spill
from offload.store import ChunkStore
from offload.types import ChunkId

Segments = tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Holder:
    """A row that an index is for.

    Attributes
    ----------
    owner : int
        Identity of the cache or fork.
    layer, row : int
    """

    owner: int
    layer: int
    row: int


@dataclass(frozen=True, slots=True)
class _Held:
    version: object
    segments: Segments


class LayerIndexes:
    """The indexes of all layers of one store, by the chunks they are over.

    Chunks are immutable and never named twice, so an index over some chunks is right for every row,
    beam and fork that has them. It is kept as long as a holder uses it, and the latest one over the
    same beginning as long as its chunks exist: the next fork will ask for it. It is kept as one
    piece: the segments it was joined from are views of it, if they are asked for again. Only the
    thread that holds the engine's lock calls methods.

    Parameters
    ----------
    store : ChunkStore
    device : torch.device
        Where indexes live.
    sizes : SegmentSizes
    directory : Path, optional
        Where indexes lie, mapped into memory; by default they are in memory.
    """

    def __init__(
        self,
        store: ChunkStore,
        device: torch.device,
        sizes: SegmentSizes,
        directory: Path | None = None,
    ) -> None:
        self._store = store
        self._spill = directory
        self._sizes = sizes
        self._builder = IndexBuilder(store, device)
        self._joined: dict[Segments, KeyIndex] = {}
        self._held: dict[Holder, _Held] = {}
        self._latest: dict[ChunkId, Segments] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all indexes that are in memory."""
        indexes = self._joined.values()
        joined = sum(index.num_bytes for index in indexes)
        if self._spill is not None:  # what is derived from the tensors stays in memory
            joined -= sum(part.nbytes for index in indexes for part in index.tensors().values())
        return joined + self._builder.num_bytes

    def over(
        self,
        holder: Holder,
        version: object,
        chunks: Sequence[ChunkId],
        heads: tuple[int, ...],
        recipe: IndexRecipe,
        queries: Tensor | None = None,
    ) -> KeyIndex:
        """Return an index over the beginning of a run of chunks, as far as segments go.

        What is missing is built now; what will be needed soon is begun.

        Parameters
        ----------
        holder : Holder
            Whom the index is kept for, until it asks for another one.
        version : object
            Equal to that of the holder's last call only if the chunks are the same.
        chunks : sequence of ChunkId
            Enough of them for a segment.
        heads : tuple of int
            KV heads that are indexed; the same at every call for these chunks.
        recipe : IndexRecipe
            How; the same at every call for these chunks.
        queries : Tensor, shape (len(heads), num_queries, key_dim), optional
            Such as will be asked.
        """
        held = self._held.get(holder)
        if held is None or held.version != version:
            jobs = self._begin_next(chunks, heads, recipe, queries)
            segments = tuple(job.chunks for job in jobs)
            if segments not in self._joined:
                self._joined[segments] = self._placed(self._join(jobs))
            held = self._held[holder] = _Held(version, segments)
            self._latest[segments[0][0]] = segments
            self._forget_unheld()
        return self._joined[held.segments]

    def prepare(
        self, chunks: Sequence[ChunkId], heads: tuple[int, ...], recipe: IndexRecipe
    ) -> None:
        """Begin to index the complete segments of the largest size, while a prompt is read."""
        size = self._store.layout.chunk_tokens
        for start, stop in self._sizes.largest(len(chunks), size):
            self._begin(Job(tuple(chunks[start:stop]), heads, recipe))

    def latest(self) -> Iterator[tuple[Segments, KeyIndex]]:
        """Yield the latest index over every beginning, and the segments it is over."""
        for segments in self._latest.values():
            yield segments, self._joined[segments]

    def adopt(self, segments: Segments, index: KeyIndex) -> None:
        """Keep an index that was built elsewhere over these chunks, which exist.

        Parameters
        ----------
        segments : tuple of Segment
            Consecutive, as ``over`` cuts them; at least one.
        index : KeyIndex
            Of the heads, and as the recipe says, that ``over`` will be asked for.
        """
        self._joined[segments] = self._placed(index)
        self._latest[segments[0][0]] = segments

    def forget(self, owner: int) -> None:
        """Drop what is kept for a cache or fork."""
        self._held = {holder: held for holder, held in self._held.items() if holder.owner != owner}
        self._forget_unheld()

    def settle(self) -> None:
        """Wait for what is being built."""
        self._builder.settle()

    def close(self) -> None:
        """Stop building. Idempotent."""
        self._builder.close()

    def _placed(self, index: KeyIndex) -> KeyIndex:
        return index if self._spill is None else spill(index, self._spill)

    def _begin(self, job: Job) -> None:
        if not any(job.chunks in segments for segments in self._joined):
            self._builder.start(job)

    def _begin_next(
        self,
        chunks: Sequence[ChunkId],
        heads: tuple[int, ...],
        recipe: IndexRecipe,
        queries: Tensor | None,
    ) -> list[Job]:
        """Begin what will be needed soon; return the segments that count now."""
        size = self._store.layout.chunk_tokens
        coming, now = (
            [Job(tuple(chunks[start:stop]), heads, recipe, queries) for start, stop in cuts]
            for cuts in (self._sizes.coming(len(chunks), size), self._sizes.cut(len(chunks), size))
        )
        for job in coming:
            self._begin(job)
        return now

    def _join(self, jobs: Sequence[Job]) -> KeyIndex:
        """Return an index over segments: what is known of the first ones, and the others."""
        num_known, known = self._longest_known(tuple(job.chunks for job in jobs))
        parts = [] if known is None else [known]
        parts += [self._builder.finish(job) for job in jobs[num_known:]]
        return type(parts[0]).join(parts)

    def _longest_known(self, segments: Segments) -> tuple[int, KeyIndex | None]:
        """Return how many of the first segments some index has, and that part of it."""
        best, owner = 0, None
        for other in self._joined:
            shared = _num_shared(segments, other)
            if shared > best:
                best, owner = shared, other
        if owner is None:
            return 0, None
        num_chunks = sum(map(len, segments[:best]))
        return best, self._joined[owner].prefix(num_chunks * self._store.layout.chunk_tokens)

    def _living(self, segments: Segments) -> Segments:
        """Return the first segments whose chunks exist, and have an index over them."""
        table = self._store.table
        living = tuple(takewhile(lambda segment: segment[-1] in table, segments))
        if living and living not in self._joined:
            _, known = self._longest_known(living)
            assert known is not None
            self._joined[living] = known
        return living

    def _forget_unheld(self) -> None:
        table = self._store.table
        self._held = {
            holder: held
            for holder, held in self._held.items()
            if held.segments[-1][-1] in table  # else the holder dropped its last tokens
        }
        self._latest = {first: self._living(segments) for first, segments in self._latest.items()}
        self._latest = {first: segments for first, segments in self._latest.items() if segments}
        used = {held.segments for held in self._held.values()} | set(self._latest.values())
        self._joined = {key: index for key, index in self._joined.items() if key in used}


def _num_shared(one: Iterable[Segment], other: Iterable[Segment]) -> int:
    """Return how many first segments two runs have in common."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
