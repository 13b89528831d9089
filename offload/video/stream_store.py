"""Keys and values of a stream on the tiers, as they were before rotation, and read by ranges."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from offload.chunk_reader import start_read
from offload.engine import Engine
from offload.runtime import Runtime
from offload.settings import check_settings
from offload.stats import CacheStats
from offload.tiers.pool import as_chunk, page_aligned
from offload.types import ChunkId, ChunkLayout

_READ_CHUNKS = 64
"""Chunks that are read together; the next ones wait until these are on the device."""


class StreamStore:
    """One row of every layer of a model, which grows for as long as the stream goes on.

    Blocks of tokens may have any length: they are ranges of one sequence of chunks.

    Parameters
    ----------
    num_layers, num_kv_heads, key_dim, value_dim : int
    dtype : torch.dtype
    device : torch.device
        Of the model.
    tiers, capacity, disk_path
        As for ``OffloadedCache``.
    chunk_tokens : int

    Raises
    ------
    ConfigError
        An argument is impossible.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        tiers: Sequence[str] = ("gpu", "cpu", "disk"),
        capacity: Mapping[str, int | str] | None = None,
        disk_path: str | Path | None = None,
        chunk_tokens: int = 64,
    ) -> None:
        self.num_layers = num_layers
        self._device = device
        self._config = check_settings(tiers, "exact", capacity, disk_path, chunk_tokens)
        layout = ChunkLayout(num_kv_heads, chunk_tokens, key_dim, value_dim, dtype)
        try:
            engine = Engine(self._config, layout, 1, num_layers, device)
            self.runtime = Runtime(engine, num_layers, 1)
        except BaseException:
            self._config.close_scratch()
            raise
        self._layout = layout
        self.bytes_from: Counter[str] = Counter()
        """Read so far, by tier."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the last layer, which has them last."""
        layers = self.runtime.layers
        last = self.num_layers - 1
        return layers[last].num_tokens if last in layers else 0

    @property
    def key_dim(self) -> int:
        """Of each key, and of each value."""
        return self._layout.key_dim

    @property
    def engine(self) -> Engine:
        """The tiers."""
        return self.runtime.engine

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Add tokens to a layer.

        Parameters
        ----------
        layer : int
        keys, values : Tensor, shape (num_kv_heads, num_tokens, dim)

        Raises
        ------
        CapacityError, StorageError
            The tiers cannot take them; the layer is as before.
        """
        self.runtime.append(layer, keys[None], values[None])

    def read(self, layer: int, ranges: Sequence[range]) -> tuple[Tensor, Tensor]:
        """Copy ranges of tokens to the device, one after the other.

        Parameters
        ----------
        layer : int
        ranges : sequence of range
            In any order.

        Returns
        -------
        keys, values : Tensor, shape (num_kv_heads, num_tokens, dim)

        Raises
        ------
        CorruptChunk, StorageError, TransferTimeout
        """
        layout, size = self._layout, self._layout.chunk_tokens
        total = sum(len(part) for part in ranges)
        out = torch.empty(
            layout.num_kv_heads, total, layout.row_dim, dtype=layout.dtype, device=self._device
        )
        wanted: dict[int, list[tuple[range, int]]] = {}
        place = 0
        for part in ranges:
            for chunk in range(part.start // size, -(-part.stop // size)):
                inside = range(max(part.start, chunk * size), min(part.stop, (chunk + 1) * size))
                wanted.setdefault(chunk, []).append((inside, place + inside.start - part.start))
            place += len(part)
        with self.engine.lock:
            self._copy(layer, wanted, out)
        return out[..., : layout.key_dim], out[..., layout.key_dim :]

    def truncate(self, num_tokens: int) -> None:
        """Keep the first tokens of every layer, where it has more."""
        for layer, sequence in self.runtime.layers.items():
            if sequence.num_tokens > num_tokens:
                self.runtime.crop(layer, num_tokens)

    def stats(self) -> CacheStats:
        """Return what is where, and what has moved so far."""
        return self.runtime.stats()

    def flush(self) -> None:
        """Wait until everything written is on its tier."""
        self.runtime.flush()

    def close(self) -> None:
        """Give up everything. Idempotent."""
        try:
            self.runtime.close()
        finally:
            self._config.close_scratch()

    def _copy(self, layer: int, wanted: dict[int, list[tuple[range, int]]], out: Tensor) -> None:
        sequence, size = self.runtime.layers[layer], self._layout.chunk_tokens
        store = self.engine.store
        store.reap()
        row = sequence.tables.rows[0]
        stored = sorted(chunk for chunk in wanted if chunk < len(row))
        memory = page_aligned(min(len(stored), _READ_CHUNKS) * self._layout.slot_bytes)
        buffers = list(memory.view(-1, self._layout.slot_bytes))
        for start in range(0, len(stored), _READ_CHUNKS):
            some = stored[start : start + _READ_CHUNKS]
            ids = [row[chunk] for chunk in some]
            store.table.protect(ids)
            try:
                started = start_read(store.tiers, store.table, ids, buffers[: len(some)])
                started.wait(store.deadline_s)
            finally:
                store.unprotect(ids)
            for chunk, buffer in zip(some, buffers, strict=False):
                self._count(row[chunk])
                _place(as_chunk(buffer, self._layout), chunk * size, wanted[chunk], out)
        for chunk in set(wanted).difference(stored):
            _place(sequence.tail[0], chunk * size, wanted[chunk], out)

    def _count(self, chunk: ChunkId) -> None:
        store = self.engine.store
        level = store.level_of(chunk)
        name = store.tiers[level].name if level < len(store.tiers) else "cpu"
        self.bytes_from[name] += self._layout.chunk_bytes


def _place(rows: Tensor, first: int, parts: Sequence[tuple[range, int]], out: Tensor) -> None:
    """Copy parts of a chunk, which begins at token ``first``, to where they belong."""
    for inside, place in parts:
        source = rows[:, inside.start - first : inside.stop - first]
        out[:, place : place + len(inside)] = source
