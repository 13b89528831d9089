"""Abstracts that are saved with a session, so that its first step need not read every key.

An index that is small (LeoAM's abstracts are a thirtieth of the keys and values) goes into the
session's file; others are built again from the chunks when they are first needed.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from offload.errors import ConfigError, CorruptChunk
from offload.index.base import KeyIndex
from offload.runtime import Runtime
from offload.sessions.session_file import MAX_BYTES
from offload.sparse.builder import Segment
from offload.sparse.retrieval import Retrieval
from offload.types import ChunkId

INDEXES = "indexes"
"""Of the state of a session; what the other keys name are layers."""

_MOST_BYTES = MAX_BYTES // 2
"""Of all indexes of a session: its file must not become too large to be read."""

_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)
"""What comes of restoring something that was never saved."""


class _Saved(TypedDict):
    """One index: over which chunks of which row of which layer, and how it was built."""

    layer: int
    row: int
    start: int
    lengths: list[int]
    recipe: str
    meta: dict[str, Any]
    tensors: list[str]


class _Place(NamedTuple):
    """Where a chunk is in a cache."""

    layer: int
    row: int
    start: int


def pack_indexes(runtime: Runtime) -> tuple[dict[str, Tensor], list[_Saved]]:
    """Return the small indexes of a runtime as named tensors and JSON.

    Of an index over what only a fork has, the beginning that they share. The caller holds the
    engine's lock.
    """
    retrieval = runtime.engine.retrieval
    tensors: dict[str, Tensor] = {}
    saved: list[_Saved] = []
    if retrieval is None or retrieval.indexes is None:
        return tensors, saved
    places, num_bytes = _places(runtime), 0
    for segments, index in retrieval.indexes.latest():
        candidates = places.get(segments[0][0], []) if index.is_abstract else []
        shared = [(_num_shared(runtime, place, segments), place) for place in candidates]
        num_segments, place = max(shared, default=(0, _Place(0, 0, 0)))
        if not num_segments:
            continue
        lengths = [len(segment) for segment in segments[:num_segments]]
        part = index.prefix(sum(lengths) * runtime.engine.layout.chunk_tokens)
        num_bytes += sum(tensor.nbytes for tensor in part.tensors().values())
        if num_bytes > _MOST_BYTES:
            break
        prefix = f"index.{len(saved)}"
        named = {f"{prefix}.{name}": tensor.cpu() for name, tensor in part.tensors().items()}
        tensors |= named
        saved.append(
            {
                "layer": place.layer,
                "row": place.row,
                "start": place.start,
                "lengths": lengths,
                "recipe": _recipe(retrieval, runtime, place.layer),
                "meta": part.meta(),
                "tensors": list(named),
            }
        )
    return tensors, saved


def restore_indexes(
    runtime: Runtime, saved: Sequence[_Saved], tensors: Mapping[str, Tensor]
) -> None:
    """Give a runtime that has just been filled the indexes that were saved with it.

    Those that the present policy would have built otherwise are left out.

    Raises
    ------
    CorruptChunk
        What was saved is no index over these chunks.
    StorageError, DiskFull
        Indexes are to lie on the disk, which does not take them.
    """
    retrieval = runtime.engine.retrieval
    if retrieval is None or retrieval.indexes is None:
        return
    with runtime.engine.lock:
        for number, each in enumerate(saved):
            try:
                found = _restored(runtime, retrieval, each, tensors)
            except _DAMAGE as error:
                raise CorruptChunk(f"saved index {number}: {error!r}") from error
            if found is not None:
                retrieval.indexes.adopt(*found)


def _restored(
    runtime: Runtime, retrieval: Retrieval, saved: _Saved, tensors: Mapping[str, Tensor]
) -> tuple[tuple[Segment, ...], KeyIndex] | None:
    """Return an index and what it is over; None if it would now be built otherwise."""
    layer = saved["layer"]
    recipe = retrieval.plan.recipe(_number(runtime, layer))
    if recipe is None or saved["recipe"] != _recipe(retrieval, runtime, layer):
        return None
    chunks = runtime.layers[layer].tables.rows[saved["row"]][saved["start"] :]
    segments = _cut(chunks, saved["lengths"])
    parts = {name.split(".", 2)[2]: tensors[name] for name in saved["tensors"]}
    index = recipe.kind.restore(parts, saved["meta"])
    layout = runtime.engine.layout
    heads = retrieval.plan.heads(layer, layout.num_kv_heads)
    if (names := index.tensors().keys()) != parts.keys():
        raise ConfigError(f"tensors {sorted(parts)}, not {sorted(names)}")
    expected = len(heads), layout.chunk_tokens * sum(map(len, segments))
    if (index.num_heads, index.num_tokens) != expected:
        raise ConfigError(
            f"{index.num_heads} heads of {index.num_tokens} tokens, not {expected[0]} of "
            f"{expected[1]}"
        )
    return segments, index


def _places(runtime: Runtime) -> dict[ChunkId, list[_Place]]:
    """Return where every chunk is; rows may share it."""
    places: dict[ChunkId, list[_Place]] = defaultdict(list)
    for layer, sequence in runtime.layers.items():
        for row, chunks in enumerate(sequence.tables.rows):
            for position, chunk in enumerate(chunks):
                places[chunk].append(_Place(layer, row, position))
    return places


def _num_shared(runtime: Runtime, place: _Place, segments: Sequence[Segment]) -> int:
    """Return how many of the first segments a row has from some position on."""
    chunks, start = runtime.layers[place.layer].tables.rows[place.row], place.start
    for count, segment in enumerate(segments):
        if tuple(chunks[start : start + len(segment)]) != segment:
            return count
        start += len(segment)
    return len(segments)


def _cut(chunks: Sequence[ChunkId], lengths: Sequence[int]) -> tuple[Segment, ...]:
    segments, start = [], 0
    for length in lengths:
        segments.append(tuple(chunks[start : start + length]))
        start += length
    if start > len(chunks) or min(lengths, default=0) < 1:
        raise ConfigError(f"segments of {list(lengths)} chunks do not fit {len(chunks)}")
    return tuple(segments)


def _number(runtime: Runtime, layer: int) -> int:
    return sorted(runtime.layers).index(layer)


def _recipe(retrieval: Retrieval, runtime: Runtime, layer: int) -> str:
    """Say how a layer is indexed, and where; nothing if it is not."""
    plan, number = retrieval.plan, _number(runtime, layer)
    recipe = plan.recipe(number)
    if recipe is None or number < plan.dense_layers:
        return ""
    heads = plan.heads(layer, runtime.engine.layout.num_kv_heads)
    cuts = f"{plan.sizes.tokens} after {plan.sink_tokens}"
    return f"{recipe.kind.__name__} {sorted(recipe.options.items())} {heads} {cuts}"
