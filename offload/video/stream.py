"""A video stream: its units, their keys and values on the tiers, and an index over them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from offload.video.adapter import Unit, VideoAdapter
from offload.video.layers import check_model
from offload.video.stream_store import StreamStore
from offload.video.thumbnails import Thumbnails
from offload.video.units import UnitPlace, UnitTable


class VideoStream:
    """What was encoded of a stream so far.

    Keys are stored as they were before rotation: positions are given when they are attended, close
    together however long the stream is. Of every unit and layer the mean key of each KV head is
    kept in memory.

    Parameters
    ----------
    adapter : VideoAdapter
    tiers, capacity, disk_path, chunk_tokens
        As for ``StreamStore``.

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
        chunk_tokens: int = 64,
    ) -> None:
        check_model(adapter)
        self.adapter = adapter
        self.units = UnitTable()
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
        self._means: dict[int, list[Tensor]] = {}
        self._stacked: dict[int, Tensor] = {}
        self._opening: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_committed = 0
        """Units that are complete in every layer."""

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
            self._means[layer] = [torch.zeros(heads, dim, device=device)]

    def append(self, layer: int, keys: Tensor, values: Tensor, places: Sequence[UnitPlace]) -> None:
        """Store what a layer made of units, ``[num_kv_heads, num_tokens, dim]``, not rotated."""
        self.store.append(layer, keys, values)
        if layer not in self._opening:
            count = places[0].num_tokens
            self._opening[layer] = (keys[:, :count].clone(), values[:, :count].clone())
        sizes = [place.num_tokens for place in places]
        means = [part.float().mean(1) for part in keys.split(sizes, 1)]
        self._means.setdefault(layer, []).extend(means)

    def commit(self, places: Sequence[UnitPlace]) -> None:
        """Note that units are complete."""
        self.num_committed += len(places)

    def undo(self, places: Sequence[UnitPlace]) -> None:
        """Take back units that failed half-way."""
        del self.units.places[-len(places) :]
        end = self.units.places[-1].tokens.stop if self.units.places else 0
        self.store.truncate(end)
        for means in self._means.values():
            del means[self.num_committed :]
        if not self.num_committed:
            self._opening = {}

    def means(self, layer: int, num_units: int) -> Tensor:
        """Return the mean keys of the first units, ``[num_units, num_kv_heads, key_dim]``."""
        known = self._stacked.get(layer)
        if known is None or len(known) < num_units:
            known = self._stacked[layer] = torch.stack(self._means[layer][: self.num_committed])
        return known[:num_units]

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
        self._means = {layer: list(each.to(self.adapter.device)) for layer, each in means.items()}
        for layer in means:
            self._opening[layer] = self.store.read(layer, [places[0].tokens])

    def opening(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values and positions of the text before the first frame."""
        keys, values = self._opening[layer]
        return keys, values, self.units.places[0].positions

    def close(self) -> None:
        """Give up everything. Idempotent."""
        self.store.close()
