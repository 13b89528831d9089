"""Abstracts that are saved with a session, so that its first step need not read every key.

An index that is small (LeoAM's abstracts are a thirtieth of the keys and values) goes into the
session's file; others are built again from the chunks when they are first needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor

from offload.errors import ConfigError, CorruptChunk
from offload.runtime import Runtime
from offload.sparse.retrieval import Retrieval
from offload.types import ChunkId

INDEXES = "indexes"
"""Of the state of a session; what the other keys name are layers."""


class _Saved(TypedDict):
    """One index: over which chunks of which row of which layer, and how it was built."""

    layer: int
    row: int
    start: int
    lengths: list[int]
    recipe: str
    meta: dict[str, Any]
    tensors: list[str]


def pack_indexes(runtime: Runtime) -> tuple[dict[str, Tensor], list[_Saved]]:
    """Return the small indexes of a runtime as named tensors and JSON."""
    retrieval = runtime.engine.retrieval
    tensors: dict[str, Tensor] = {}
    saved: list[_Saved] = []
    if retrieval is None or retrieval.indexes is None:
        return tensors, saved
    places = _places(runtime)
    for segments, index in retrieval.indexes.latest():
        place = places.get(segments[0][0])
        if place is None or not index.is_abstract:
            continue
        layer, row, start = place
        prefix = f"index.{len(saved)}"
        named = {f"{prefix}.{name}": tensor.cpu() for name, tensor in index.tensors().items()}
        tensors |= named
        saved.append(
            {
                "layer": layer,
                "row": row,
                "start": start,
                "lengths": [len(segment) for segment in segments],
                "recipe": _recipe(retrieval, runtime, layer),
                "meta": index.meta(),
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
    """
    retrieval = runtime.engine.retrieval
    if retrieval is None or retrieval.indexes is None:
        return
    for each in saved:
        recipe = retrieval.plan.recipe(_number(runtime, each["layer"]))
        if recipe is None or each["recipe"] != _recipe(retrieval, runtime, each["layer"]):
            continue
        try:
            chunks = runtime.layers[each["layer"]].tables.rows[each["row"]][each["start"] :]
            parts = {name.split(".", 2)[2]: tensors[name] for name in each["tensors"]}
            index = recipe.kind.restore(parts, each["meta"])
            segments = _cut(chunks, each["lengths"])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CorruptChunk(f"index of layer {each['layer']}: {error!r}") from error
        size = runtime.engine.layout.chunk_tokens
        if index.num_tokens != size * sum(map(len, segments)):
            raise CorruptChunk(
                f"index of layer {each['layer']} over {index.num_tokens} tokens, not "
                f"{size * sum(map(len, segments))}"
            )
        retrieval.indexes.adopt(segments, index)


def _places(runtime: Runtime) -> dict[ChunkId, tuple[int, int, int]]:
    """Return layer, row and position of every chunk."""
    return {
        chunk: (layer, row, position)
        for layer, sequence in runtime.layers.items()
        for row, chunks in enumerate(sequence.tables.rows)
        for position, chunk in enumerate(chunks)
    }


def _cut(chunks: Sequence[ChunkId], lengths: Sequence[int]) -> tuple[tuple[ChunkId, ...], ...]:
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
    recipe = retrieval.plan.recipe(_number(runtime, layer))
    heads = retrieval.plan.heads(layer, runtime.engine.layout.num_kv_heads)
    return "" if recipe is None else f"{recipe.kind.__name__} {dict(recipe.options)} {heads}"
