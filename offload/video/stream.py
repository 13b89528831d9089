"""A video stream: its units, their keys and values on the tiers, and an index over them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.settings import check_chunk_tokens
from offload.video.adapter import Unit, VideoAdapter
from offload.video.layers import check_model
from offload.video.mean_keys import MeanKeys, means_of
from offload.video.stream_store import StreamStore
from offload.video.thumbnails import Thumbnails
from offload.video.units import UnitPlace, UnitTable

_CHUNK_TOKENS = 64
_LEAST_CHUNK_TOKENS, _MOST_CHUNK_TOKENS = 32, 128


class VideoStream:
    """What was encoded of a stream so far.

    Keys are stored as they were before rotation: positions are given when they are attended, close
    together however long the stream is. Of every unit and layer the mean key of each KV head is
    kept in memory.

    Parameters
    ----------
    adapter : VideoAdapter
    tiers, capacity, disk_path
        As for ``StreamStore``.
    chunk_tokens : int, optional
        Default: such that a frame is whole chunks, where all frames are alike.

    Raises
    ------
    ConfigError
        The model cannot be streamed, or an argument is impossible.
    """

    def __init__(
        self,
        adapter: VideoAdapter,
        *,
        tiers: Sequence[str] = ("gpu", "cpu", "disk"),
        capacity: Mapping[str, int | str] | None = None,
        disk_path: str | Path | None = None,
        chunk_tokens: int | None = None,
    ) -> None:
        check_model(adapter)
        chunk_tokens = (
            chunk_tokens_for(adapter.unit_tokens) if chunk_tokens is None else chunk_tokens
        )
        self.adapter = adapter
        self.units = UnitTable(check_chunk_tokens(chunk_tokens))
        config = adapter.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.store = StreamStore(
            int(config.num_hidden_layers),
            int(config.num_key_value_heads),
            dim,
            dim,
            adapter.dtype,
            adapter.device,
            tiers=tiers,
            capacity=capacity,
            disk_path=disk_path,
            chunk_tokens=chunk_tokens,
        )
        self.thumbnails = Thumbnails()
        self._means = [MeanKeys() for _ in range(self.store.num_layers)]
        self._opening: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_committed = 0
        """Units that are complete in every layer."""

    @property
    def last_s(self) -> float:
        """When its last frame was shown; -1 before the first."""
        places = self.units.places
        return places[-1].complete_s if len(places) > 1 else -1.0

    def begin(self, units: Sequence[Unit]) -> list[UnitPlace]:
        """Give units their places; ``append`` and then ``commit`` or ``undo`` follow."""
        return self.units.add(units)

    def open_without_text(self, opening: Unit) -> None:
        """Begin a stream of a model that wants nothing before the first frame."""
        self.commit(self.units.add([opening]))
        config, device = self.adapter.config, self.adapter.device
        heads, dim = int(config.num_key_value_heads), self.store.key_dim
        for layer in range(self.store.num_layers):
            nothing = torch.empty(heads, 0, dim, dtype=self.adapter.dtype, device=device)
            self._opening[layer] = (nothing, nothing)
            self._means[layer].extend(
                torch.zeros(1, heads, dim, dtype=self.adapter.dtype, device=device)
            )

    def append(self, layer: int, keys: Tensor, values: Tensor, places: Sequence[UnitPlace]) -> None:
        """Store what a layer made of units, ``[num_kv_heads, num_tokens, dim]``, not rotated."""
        if layer not in self._opening:
            self._opening[layer] = (keys.clone(), values.clone())
            padding = (0, 0, 0, self.units.end - keys.shape[1])
            self.store.append(layer, pad(keys, padding), pad(values, padding))
        else:
            self.store.append(layer, keys, values)
        self._means[layer].extend(means_of(keys, [place.num_tokens for place in places]))

    def commit(self, places: Sequence[UnitPlace]) -> None:
        """Note that units are complete."""
        self.num_committed += len(places)

    def undo(self, places: Sequence[UnitPlace]) -> None:
        """Take back units that failed half-way."""
        del self.units.places[-len(places) :]
        self.store.truncate(self.units.end)
        for means in self._means:
            means.truncate(self.num_committed)
        if not self.num_committed:
            self._opening = {}

    def means(self, layer: int, num_units: int) -> Tensor:
        """Return the mean keys of the first units, ``[num_units, num_kv_heads, key_dim]``."""
        return self._means[layer].first(min(num_units, self.num_committed))

    def restore(self, places: Sequence[UnitPlace], means: Mapping[int, Tensor]) -> None:
        """Take over units whose keys and values the store has been given.

        Parameters
        ----------
        places : sequence of UnitPlace
        means : mapping of int to Tensor, shape (num_units, num_kv_heads, key_dim)
            By layer.
        """
        self.units.places = list(places)
        self.num_committed = len(places)
        for layer, each in means.items():
            self._means[layer].extend(each.to(self.adapter.device))
            self._opening[layer] = self.store.read(layer, [places[0].tokens])

    def opening(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and positions of the text before the first frame."""
        keys, values = self._opening[layer]
        return keys, values, self.units.places[0].positions

    def close(self) -> None:
        """Give up everything. Idempotent."""
        self.store.close()


def chunk_tokens_for(unit_tokens: int | None) -> int:
    """Return tokens of a chunk such that units begin where chunks do, if there is such a number.

    What a question reads is whole chunks: of 64 tokens, a third more than units of 196 have.

    Parameters
    ----------
    unit_tokens : int or None
        Of each unit; None if they differ.
    """
    if unit_tokens is None:
        return _CHUNK_TOKENS
    if unit_tokens <= _CHUNK_TOKENS:
        return _CHUNK_TOKENS // unit_tokens * unit_tokens
    sizes = range(_MOST_CHUNK_TOKENS, _LEAST_CHUNK_TOKENS - 1, -1)
    return next((size for size in sizes if unit_tokens % size == 0), _CHUNK_TOKENS)
