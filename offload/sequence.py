"""One layer's keys and values: full chunks in the store, the growing tail on the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.rows import RowTables
from offload.store import ChunkStore
from offload.types import ChunkId


@dataclass(frozen=True, slots=True)
class Appended:
    """What one append made visible, for the attention call that follows it.

    Attributes
    ----------
    num_past_chunks : int
        Chunks per row that were complete before, to be read from the tiers.
    tail : Tensor, shape (batch, num_kv_heads, num_tail_tokens, row_dim)
        What follows them: the tail as it was before, and the new token too if it was just one.
    keys, values : Tensor, shape (batch, num_kv_heads, num_new_tokens, dim), or None
        The new tokens if they are not in ``tail``: still on the device, so that a prefill never
        reads back what it wrote.
    """

    num_past_chunks: int
    tail: Tensor
    keys: Tensor | None
    values: Tensor | None


class LayerSequence:
    """The rows of one layer.

    A token is in the tail until the token after a full tail arrives; then the tail becomes a chunk.
    Full chunks are immutable. A failed append leaves the sequence as it was.

    Only the thread that runs the model calls methods.

    Parameters
    ----------
    store : ChunkStore
    layer : int
    """

    def __init__(self, store: ChunkStore, layer: int) -> None:
        self._store = store
        self._layer = layer
        self._layout = store.layout
        self.tables = RowTables(store.table.share, store.release)
        self.tail = torch.empty(0)
        """``[batch, num_kv_heads, chunk_tokens, row_dim]``; the first ``tail_tokens`` are valid."""
        self.tail_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens per row."""
        return self.tables.num_positions * self._layout.chunk_tokens + self.tail_tokens

    @property
    def tail_bytes(self) -> int:
        """Bytes of the tail on the device."""
        return self.tail.numel() * self.tail.element_size()

    def open(self, batch: int, device: torch.device) -> None:
        """Start with ``batch`` empty rows on a device."""
        self.tables.open(batch)
        self.tail = torch.empty(
            (batch, *self._layout.shape), dtype=self._layout.dtype, device=device
        )

    def restore(self, columns: Sequence[Sequence[ChunkId]], tail: Tensor) -> None:
        """Continue where another sequence was; this one was just opened.

        Parameters
        ----------
        columns : sequence of sequence of ChunkId
            Full chunks, by position and then by row, one reference each.
        tail : Tensor, shape (batch, num_kv_heads, num_tail_tokens, row_dim)
            What follows; at most a chunk.
        """
        self.tables.extend(columns)
        self.tail_tokens = tail.shape[2]
        self.tail[:, :, : self.tail_tokens] = tail

    def append(self, keys: Tensor, values: Tensor) -> Appended:
        """Add tokens to every row.

        Parameters
        ----------
        keys, values : Tensor, shape (batch, num_kv_heads, num_new_tokens, dim)

        Raises
        ------
        CapacityError, StorageError
            The tiers could not take a chunk; the sequence is as before.
        """
        size, used = self._layout.chunk_tokens, self.tail_tokens
        new, past = keys.shape[2], self.tables.num_positions
        if used + new > size:
            before = self.tail[:, :, :used].clone()
            self._seal(keys, values)
            return Appended(past, before, keys, values)
        self._write_tail(used, keys, values)
        if new == 1:
            return Appended(past, self.tail[:, :, : used + 1], None, None)
        return Appended(past, self.tail[:, :, :used], keys, values)

    def crop(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens of every row.

        A cut inside a full chunk brings that chunk back to the device as the tail.
        """
        size = self._layout.chunk_tokens
        full, rest = divmod(num_tokens, size)
        if full >= self.tables.num_positions:
            self.tail_tokens = num_tokens - self.tables.num_positions * size
            return
        if rest:
            restored = self._read_column(full)
            self.tail[:, :, :rest] = restored[:, :, :rest]
        self.tables.truncate(full)
        self.tail_tokens = rest

    def select(self, indices: Sequence[int]) -> None:
        """Make row ``i`` a copy of what was row ``indices[i]``; no chunk is moved or copied."""
        index = torch.tensor(list(indices), device=self.tail.device)
        self.tail = self.tail.index_select(0, index)
        self.tables.select(indices)

    def read_all(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values, ``[batch, num_kv_heads, num_tokens, dim]``, on the device.

        For tools that look into a cache; needs memory for the whole layer, outside any capacity.
        """
        columns = [self._read_column(i) for i in range(self.tables.num_positions)]
        rows = torch.cat([*columns, self.tail[:, :, : self.tail_tokens]], 2)
        return rows[..., : self._layout.key_dim], rows[..., self._layout.key_dim :]

    def read_after(self, num_positions: int) -> Tensor:
        """Return what follows so many chunks, ``[batch, num_kv_heads, num_tokens, row_dim]``."""
        later = range(num_positions, self.tables.num_positions)
        columns = [self._read_column(position) for position in later]
        return torch.cat([*columns, self.tail[:, :, : self.tail_tokens]], 2)

    def fork(self) -> "LayerSequence":
        """Return a copy that shares every chunk; only the tail is copied."""
        copy = LayerSequence(self._store, self._layer)
        copy.tables = self.tables.fork()
        copy.tail = self.tail.clone()
        copy.tail_tokens = self.tail_tokens
        return copy

    def close(self) -> None:
        """Release every chunk and drop the tail."""
        self.tables.close()
        self.tail_tokens = 0
        self.tail = torch.empty(0)

    def _seal(self, keys: Tensor, values: Tensor) -> None:
        """Turn the tail and what follows into chunks; the rest becomes the new tail."""
        size, used = self._layout.chunk_tokens, self.tail_tokens
        head = size - used if used else 0
        whole = max(0, (keys.shape[2] - head - 1) // size) * size
        stop = head + whole
        first = self.tables.num_positions * size
        columns = []
        try:
            if used:
                self._write_tail(used, keys[:, :, :head], values[:, :, :head])
                key_dim = self._layout.key_dim
                columns += self._store.put(
                    self._layer, first, self.tail[..., :key_dim], self.tail[..., key_dim:]
                )
            if whole:
                columns += self._store.put(
                    self._layer,
                    first + len(columns) * size,
                    keys[:, :, head:stop],
                    values[:, :, head:stop],
                )
        except BaseException:
            self._store.release(chunk for column in columns for chunk in column)
            self.tail_tokens = used
            raise
        self.tables.extend(columns)
        self.tail_tokens = 0
        self._write_tail(0, keys[:, :, stop:], values[:, :, stop:])

    def _write_tail(self, start: int, keys: Tensor, values: Tensor) -> None:
        stop, key_dim = start + keys.shape[2], self._layout.key_dim
        self.tail[:, :, start:stop, :key_dim] = keys
        self.tail[:, :, start:stop, key_dim:] = values
        self.tail_tokens = stop

    def _read_column(self, position: int) -> Tensor:
        """Return the chunks of one position, ``[batch, num_kv_heads, chunk_tokens, row_dim]``."""
        rows = [self._store.read_chunk(row[position]) for row in self.tables.rows]
        return torch.stack(rows).to(self.tail.device)


def check_states(keys: Tensor, values: Tensor, expected: Tensor, layer: int, key_dim: int) -> None:
    """Raise ConfigError if new keys and values do not continue what a layer holds.

    Parameters
    ----------
    keys, values : Tensor, shape (batch, num_kv_heads, num_new_tokens, dim)
    expected : Tensor, shape (batch, num_kv_heads, chunk_tokens, row_dim)
        The layer's tail.
    layer : int
    key_dim : int
    """
    found = (*keys.shape[:2], keys.shape[3], values.shape[3])
    wanted = (*expected.shape[:2], key_dim, expected.shape[3] - key_dim)
    if found != wanted:
        raise ConfigError(
            f"layer {layer} got keys and values with (batch, kv heads, key dim, value dim) = "
            f"{found}, but its cache holds {wanted}"
        )
    if keys.dtype != expected.dtype or keys.device != expected.device:
        raise ConfigError(
            f"layer {layer} got {keys.dtype} on {keys.device}, but its cache holds "
            f"{expected.dtype} on {expected.device}"
        )
