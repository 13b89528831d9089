"""Keys and values of a stream on the tiers, as they were before rotation, and read by ranges."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from offload.engine import Engine
from offload.runtime import Runtime
from offload.settings import check_settings
from offload.stats import CacheStats
from offload.tiers.pool import page_aligned
from offload.types import ChunkLayout
from offload.video.range_read import Piece, RangeRead

_MAX_SPARES = 2
"""Blocks of host memory that are kept for the next reads: of one layer, and of the one ahead."""


class PendingStates:
    """Keys and values of ranges of tokens, on their way to the device.

    ``result`` or ``abandon`` must be called, by the thread that began the read.
    """

    def __init__(self, store: "StreamStore", reading: RangeRead, out: Tensor) -> None:
        self._store = store
        self._reading = reading
        self._out = out

    def result(self) -> tuple[Tensor, Tensor]:
        """Wait, and return keys and values, ``[num_kv_heads, num_tokens, dim]``.

        Raises
        ------
        CorruptChunk, StorageError, TransferTimeout
        """
        self._reading.wait(self._store.engine.store.deadline_s)
        self._store.keep_memory(self._reading.memory)
        return self._out[..., : self._store.key_dim], self._out[..., self._store.key_dim :]

    def abandon(self) -> None:
        """Give up what was asked for. Idempotent."""
        self._reading.abandon()


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
        self.seconds_from: defaultdict[str, float] = defaultdict(float)
        """For how long callers stood still for it, by tier."""
        self._spares: list[Tensor] = []

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
        return self.start_read(layer, ranges).result()

    def start_read(self, layer: int, ranges: Sequence[range]) -> PendingStates:
        """Begin to copy ranges of tokens to the device; see ``read``.

        Host memory for what comes from the disk, as much as that is, is taken beside the tiers.
        """
        layout, size = self._layout, self._layout.chunk_tokens
        total = sum(len(part) for part in ranges)
        out = torch.empty(
            layout.num_kv_heads, total, layout.row_dim, dtype=layout.dtype, device=self._device
        )
        wanted: dict[int, list[Piece]] = {}
        place = 0
        for part in ranges:
            for chunk in range(part.start // size, -(-part.stop // size)):
                inside = range(max(part.start, chunk * size), min(part.stop, (chunk + 1) * size))
                wanted.setdefault(chunk, []).append((inside, place + inside.start - part.start))
            place += len(part)
        sequence = self.runtime.layers[layer]
        with self.engine.lock:
            row, tail = sequence.tables.rows[0], sequence.tail[0]
            reading = RangeRead(self.engine, row, tail, wanted, out, self._take_memory, self._count)
        return PendingStates(self, reading, out)

    def keep_memory(self, memory: Tensor) -> None:
        """Keep host memory that a read has ended with for later ones."""
        known = sorted([*self._spares, memory], key=len)
        self._spares = [each for each in known if len(each)][-_MAX_SPARES:]

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

    def _take_memory(self, num_bytes: int) -> Tensor:
        for place, spare in enumerate(self._spares):
            if len(spare) >= num_bytes:
                return self._spares.pop(place)
        return page_aligned(num_bytes)

    def _count(self, tier: str, num_bytes: int, seconds: float) -> None:
        self.bytes_from[tier] += num_bytes
        self.seconds_from[tier] += seconds
