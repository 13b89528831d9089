"""``OffloadedCache``: a transformers cache that lives on several tiers."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from transformers import Cache, DynamicCache

from offload import attention, masks
from offload.core import CacheCore
from offload.layers import OffloadedLayer, offloaded
from offload.masks import MaskLength
from offload.settings import check_settings
from offload.stats import CacheStats, TierStats
from offload.support import check_model_config, latent_dims


class OffloadedCache(Cache):
    """A KV cache on device, host and disk, for ``model.generate(..., past_key_values=cache)``.

    Works on unmodified models under every attention implementation. Full-attention layers are
    offloaded; layers of bounded size (sliding windows, recurrent states) stay on the device.
    Results are those of ``DynamicCache``.

    Use one cache on one thread at a time; several caches may be used on several threads.

    Parameters
    ----------
    tiers : sequence of str
        Ordered, non-empty subset of ``["gpu", "cpu", "disk"]``. ``"gpu"`` is the device of the
        model, also where that is the CPU.
    policy : str
        ``"exact"``: every query attends to every key.
    capacity : mapping of str to int or str, optional
        Hard limit per tier, such as ``{"gpu": "2GiB", "cpu": "8GiB", "disk": "200GiB"}``. Tiers
        that are not named get a share of what is free, never more than half.
    disk_path : path, optional
        Folder for the disk tier; a private folder is made inside and removed on ``close``. Default:
        the user's cache folder.
    chunk_tokens : int
        Tokens per chunk, the unit that moves between tiers.
    config : PreTrainedConfig, optional
        The model's config. By default it is learnt from the first forward pass.

    Raises
    ------
    ConfigError
        An argument is impossible, or the model cannot be offloaded.
    """

    def __init__(
        self,
        tiers: Sequence[str],
        *,
        policy: str = "exact",
        capacity: Mapping[str, int | str] | None = None,
        disk_path: str | Path | None = None,
        chunk_tokens: int = 64,
        config: Any = None,
    ) -> None:
        core = CacheCore(check_settings(tiers, policy, capacity, disk_path, chunk_tokens))
        self._adopt(core, [])
        if config is not None:
            try:
                self.bind(config)
            except BaseException:
                self.close()
                raise

    layers: list[Any]
    _bound: bool
    _records_past: bool

    def bind(self, config: Any) -> None:
        """Learn the kinds of the model's layers; called by the first forward pass.

        Raises
        ------
        ConfigError
            The model cannot be offloaded; says what to use instead.
        """
        if self._bound or config is None:
            return
        text_config = config.get_text_config(decoder=True)
        check_model_config(text_config)
        stock = DynamicCache(config=text_config).layers
        layers = [offloaded(layer, self._core, i, self) for i, layer in enumerate(stock)]
        ours = sum(isinstance(layer, OffloadedLayer) for layer in layers)
        self.layers[:] = layers
        self._bound = True
        self._core.num_layers = max(1, ours)
        self._core.can_undo = ours == len(layers)
        self._core.latent_dims = latent_dims(text_config)
        if self._records_past:
            self.activate_past_recording()

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of one layer; see ``OffloadedLayer.update``."""
        self._core.check_open()
        while len(self.layers) <= layer_idx:
            self.layers.append(OffloadedLayer(self._core, len(self.layers), self))
        states: tuple[Tensor, Tensor]
        states = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length and offset of the keys that the next mask covers."""
        if layer_idx >= len(self.layers):
            return MaskLength(query_length, self), 0
        return super().get_mask_sizes(query_length, layer_idx)

    def activate_past_recording(self) -> None:
        """Make layers of bounded size keep what ``crop`` may want back (assisted decoding)."""
        self._records_past = True  # generate asks before the first forward tells the layers
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reset(self) -> None:
        """Forget every token; tiers, capacities and the disk folder stay."""
        self._core.reset()
        for layer in self.layers:
            layer.reset()

    def stats(self) -> CacheStats:
        """Return bytes per tier, what moved, and how long the model waited."""
        found = self._core.stats()
        if found is not None:
            return found
        capacities = self._core.config.capacities
        empty = {name: TierStats(0, 0, size, 0, 0, 0) for name, size in capacities.items()}
        return CacheStats(empty, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0, 0)

    @property
    def disk_folder(self) -> Path | None:
        """The private folder of the disk tier; None without one."""
        scratch = self._core.config.scratch
        return None if scratch is None else scratch.path

    def flush(self) -> None:
        """Wait until every chunk that is on its way to the disk has arrived.

        Raises
        ------
        DiskFull, StorageError, TransferTimeout
            One has not; it stays readable from memory.
        """
        self._core.flush()

    def close(self) -> None:
        """Give back memory, threads and the disk folder. Idempotent; also runs at exit."""
        self._finalizer()

    def check_integrity(self) -> None:
        """Raise AssertionError if a chunk is lost, shared wrongly, or a tier is over capacity."""
        if self._core.runtime is not None:
            self._core.runtime.check_integrity()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy-on-write fork: chunks are shared, only the tails are copied."""
        import copy

        fork = type(self).__new__(type(self))
        fork._adopt(self._core.fork(), [])
        fork._bound, fork._records_past = self._bound, self._records_past
        for layer in self.layers:
            ours = isinstance(layer, OffloadedLayer)
            fork.layers.append(
                layer.fork(fork._core, fork, memo) if ours else copy.deepcopy(layer, memo)
            )
        return fork

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        for layer in self.layers:
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k}={v}" for k, v in self._core.config.capacities.items())
        return f"{type(self).__name__}({self.get_seq_length()} tokens; {sizes} bytes)"

    def _adopt(self, core: CacheCore, layers: list[Any]) -> None:
        attention.install()
        masks.install()
        super().__init__(layers=layers)
        self._core = core
        self._bound = False
        self._records_past = False
        # Does not hold the cache itself, so that dropping the last reference closes it.
        self._finalizer = weakref.finalize(self, core.close)
