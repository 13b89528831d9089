"""On which tiers the keys and values of a cache are, and moving them between tiers."""

import time
from collections import Counter

from offload import OffloadedCache
from offload.chunk_reader import start_read
from offload.daemon.requests import CachedTokens
from offload.daemon.state import TIER_NAMES
from offload.engine import Engine
from offload.errors import CapacityError
from offload.runtime import Runtime
from offload.tiers.pool import page_aligned
from offload.types import ChunkId

_NAMES = ("device", "host", "disk")


def num_bytes(cache: OffloadedCache) -> int:
    """Return the bytes of a cache's keys and values, shared or not."""
    runtime = cache._core.runtime
    if runtime is None:
        return 0
    layout = runtime.engine.layout
    num_tokens = sum(layer.num_tokens for layer in runtime.layers.values())
    return num_tokens * layout.chunk_bytes // layout.chunk_tokens


def residency(cache: OffloadedCache, num_tokens: int, tail: str = "device") -> CachedTokens:
    """Return where the first tokens of a cache are read from.

    A token counts for the tier of its chunk, as the mean over the layers, rounded so that the sum
    is right. The growing chunk is on the device, or where it has just come from: ``tail``.
    """
    runtime = cache._core.runtime
    if runtime is None or not runtime.layers:
        return CachedTokens(**{tail: num_tokens})
    counts: Counter[str] = Counter()
    for chunk, tokens in _chunks(runtime, num_tokens):
        counts[_tier_of(runtime.engine, chunk)] += tokens
    num_layers = len(runtime.layers)
    counts[tail] += num_layers * num_tokens - counts.total()
    return _shares(counts, num_tokens, num_layers)


def demote_from_device(cache: OffloadedCache) -> int:
    """Move chunks that only this cache has from the device to the next tier; return how many.

    Stops where the tiers below are full.
    """
    runtime = cache._core.runtime
    if runtime is None or len(runtime.engine.tiers) < 2 or runtime.engine.device_pool is None:
        return 0
    engine, moved = runtime.engine, 0
    with engine.lock:
        engine.stream.drain()
        for chunk, _ in _chunks(runtime, None):
            entry = engine.store.table[chunk]
            if 0 not in entry.slots or entry.ref_count > 1 or entry.protect_count:
                continue
            try:
                engine.store.demote(chunk, 0)
            except CapacityError:
                break
            moved += 1
    return moved


def promote_from_disk(cache: OffloadedCache, until_s: float) -> bool:
    """Copy chunks from the disk into free slots of memory, until a time of ``time.monotonic``.

    Returns
    -------
    bool
        Whether there is no more to do: all are in memory, or there is no room.

    Raises
    ------
    CorruptChunk, StorageError
    """
    runtime = cache._core.runtime
    if runtime is None or len(runtime.engine.tiers) < 2:
        return True
    engine = runtime.engine
    levels = range(len(engine.tiers) - 1)
    with engine.lock:
        for chunk, _ in _chunks(runtime, None):
            slots = engine.store.table[chunk].slots
            if min(slots, default=0) < len(levels):
                continue
            level = next((each for each in levels if engine.tiers[each].num_free), None)
            if level is None:
                return True
            if time.monotonic() >= until_s:
                return False
            content = page_aligned(engine.layout.slot_bytes)
            reading = start_read(engine.tiers, engine.store.table, [chunk], [content])
            reading.wait(engine.config.deadline_s)
            engine.store.promote(chunk, level, content)
    return True


def _chunks(runtime: Runtime, num_tokens: int | None) -> list[tuple[ChunkId, int]]:
    """Return the chunks of all layers, and how many of the first tokens each holds."""
    size = runtime.engine.layout.chunk_tokens
    found = []
    for layer in runtime.layers.values():
        for position, chunk in enumerate(layer.tables.rows[0]):
            tokens = size if num_tokens is None else min(size, num_tokens - position * size)
            if tokens <= 0:
                break
            found.append((chunk, tokens))
    return found


def _tier_of(engine: Engine, chunk: ChunkId) -> str:
    """Return the tier that a chunk is read from; one in a write buffer is on the host."""
    level = engine.store.level_of(chunk)
    return "host" if level >= len(engine.tiers) else TIER_NAMES[engine.tiers[level].name]


def _shares(counts: Counter[str], num_tokens: int, num_layers: int) -> CachedTokens:
    """Divide by the number of layers; what rounding leaves goes to the largest remainders."""
    whole = {name: counts[name] // num_layers for name in _NAMES}
    rest = sorted(_NAMES, key=lambda name: -(counts[name] % num_layers))
    for name in rest[: num_tokens - sum(whole.values())]:
        whole[name] += 1
    return CachedTokens(**whole)
