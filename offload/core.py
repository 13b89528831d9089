"""The state of one Hugging Face cache, apart from transformers' own classes."""

import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from offload.engine import Engine
from offload.engine_config import EngineConfig
from offload.errors import ClosedError, ConfigError, CorruptChunk
from offload.exact import AttentionCall
from offload.runtime import Runtime
from offload.sequence import Appended
from offload.session_link import SessionLink
from offload.stats import CacheStats, TierStats
from offload.types import ChunkLayout


@dataclass(slots=True)
class _Family:
    """What a cache and its forks have in common.

    Attributes
    ----------
    num_open : int
        Caches not closed yet; the last one removes the files.
    engine : Engine or None
        The tiers, made by the first keys that any of them sees.
    links : dict of (Path, str) to SessionLink
        By root and salt of the session store.
    abandoned : deque of CacheCore
        Dropped without being closed, for whoever uses one of the others next.
    """

    num_open: int = 1
    engine: Engine | None = None
    links: dict[tuple[Path, str], SessionLink] = field(default_factory=dict)
    abandoned: "deque[CacheCore]" = field(default_factory=deque)

    def bury(self) -> None:
        """Close the caches that nobody holds any more."""
        while self.abandoned:
            self.abandoned.popleft().close()


class CacheCore:
    """Engine settings, and the runtime once the first keys have told its layout.

    A step that fails (a full disk, a corrupt record) is undone: every layer goes back to the length
    it had when the step began, so the cache stays usable. If that fails too, or if layers that
    cannot be undone took part, the cache is ``torn`` and only ``reset`` or ``close`` are left.

    Parameters
    ----------
    config : EngineConfig
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.runtime: Runtime | None = None
        self.num_layers = 1
        """Offloaded layers expected, for the device memory their tails will need."""
        self.latent_dims: tuple[int, int] | None = None
        """Widths of the latents that an MLA model caches instead of keys and values."""
        self.can_undo = True
        self._step_tokens = 0
        self._is_closed = False
        self._torn_by: BaseException | None = None
        self._family = _Family()

    def check_open(self) -> None:
        """Raise ClosedError if the cache was closed or torn."""
        if self._family.abandoned:
            self._family.bury()
        if self._is_closed:
            raise ClosedError("the cache is closed")
        if self._torn_by is not None:
            raise ClosedError(
                f"an earlier step failed and could not be undone ({self._torn_by}); "
                "reset() or close() the cache"
            ) from self._torn_by

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Appended:
        """Add the new tokens of one layer.

        Parameters
        ----------
        layer : int
        keys, values : Tensor, shape (batch, num_kv_heads, num_new_tokens, dim)
        """
        self.check_open()
        runtime = self._open(keys, values)
        length = self.num_tokens(layer)
        begins_step = layer == min(runtime.layers, default=layer)
        self._step_tokens = length if begins_step else max(length, self._step_tokens)
        try:
            return runtime.append(layer, keys, values)
        except BaseException as error:
            self._undo(error)
            raise

    def attend(self, layer: int, call: AttentionCall, appended: Appended) -> Tensor:
        """Attend for one layer; see ``Runtime.attend``."""
        self.check_open()
        assert self.runtime is not None
        try:
            return self.runtime.attend(layer, call, appended)
        except BaseException as error:
            self.report_damage(error)
            self._undo(error)
            raise

    def read_layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return all keys and values of one layer; see ``LayerSequence.read_all``."""
        self.check_open()
        assert self.runtime is not None
        return self.runtime.read_layer(layer)

    def num_tokens(self, layer: int) -> int:
        """Return the tokens per row that a layer holds."""
        if self.runtime is None or layer not in self.runtime.layers:
            return 0
        return self.runtime.layers[layer].num_tokens

    def stats(self) -> CacheStats:
        """Return the runtime's statistics; before the first token, those of empty tiers."""
        if self.runtime is not None:
            return self.runtime.stats()
        capacities = self.config.capacities
        empty = {name: TierStats(0, 0, size, 0, 0, 0) for name, size in capacities.items()}
        return CacheStats(empty, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0, 0)

    def flush(self) -> None:
        """Wait for every store in flight."""
        self.check_open()
        if self.runtime is not None:
            self.runtime.flush()

    def reset(self) -> None:
        """Forget every token. The next ones may have another shape, dtype or batch."""
        if self._is_closed:
            self.check_open()
        self._torn_by = None
        self._drop_runtime()

    def fork(self) -> "CacheCore":
        """Return a copy that shares every chunk."""
        self.check_open()
        copy = CacheCore(self.config)
        copy.num_layers = self.num_layers
        copy.latent_dims = self.latent_dims
        copy.can_undo = self.can_undo
        copy.runtime = None if self.runtime is None else self.runtime.fork()
        copy._family = self._family
        copy._family.num_open += 1
        return copy

    def close(self) -> None:
        """Give everything back: memory, threads, files. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self.runtime is not None:
                self.runtime.close()
        finally:
            self._family.num_open -= 1
            if self._family.num_open == 0:
                self._close_family()

    def abandon(self) -> None:
        """Close a cache that nobody holds, as soon as that is safe.

        Garbage is collected on any thread at any moment: in the middle of a step of another fork,
        or on a thread that such a step waits for. So it is left to the next step, unless there will
        be none.
        """
        family = self._family
        if self._is_closed:
            return
        family.abandoned.append(self)
        if len(family.abandoned) < family.num_open:
            return
        if threading.current_thread().name.startswith("offload-"):
            threading.Thread(target=family.bury, name="offload-bury").start()  # which joins it
        else:
            family.bury()

    def open(self, layout: ChunkLayout, batch: int, device: torch.device) -> Runtime:
        """Open the tiers for chunks of a layout and so many rows, unless they are open.

        Raises
        ------
        ConfigError
            A fork holds other chunks on the tiers they share.
        CapacityError
        """
        if self.runtime is None:
            engine = self._family.engine
            if engine is None or not engine.is_in_use:
                engine = Engine(self.config, layout, batch, self.num_layers, device)
                self._family.engine = engine
            elif engine.layout != layout or engine.device != device:
                raise ConfigError(
                    f"a fork of this cache holds {engine.layout} on {engine.device} on the tiers "
                    f"they share, and {layout} on {device} cannot join it; close the fork"
                )
            self.runtime = Runtime(engine, self.num_layers, batch)
        return self.runtime

    @property
    def is_shared(self) -> bool:
        """Whether forks of this cache are open."""
        return self._family.num_open > 1

    @property
    def links(self) -> dict[tuple[Path, str], SessionLink]:
        """What this cache and its forks have in common with session stores, by root and salt."""
        return self._family.links

    def _open(self, keys: Tensor, values: Tensor) -> Runtime:
        if self.runtime is not None:
            return self.runtime
        size = self.config.chunk_tokens
        layout = ChunkLayout(keys.shape[1], size, keys.shape[3], values.shape[3], keys.dtype)
        return self.open(layout, keys.shape[0], keys.device)

    def _close_family(self) -> None:
        try:
            for link in self.links.values():
                link.close()
        finally:
            self.config.close_scratch()

    def _drop_runtime(self) -> None:
        if self.runtime is not None:
            runtime, self.runtime = self.runtime, None
            runtime.close()
            if self._family.num_open == 1:
                for link in self.links.values():
                    link.forget()

    def report_damage(self, error: BaseException) -> None:
        """Tell the session stores which of their records could not be read."""
        if isinstance(error, CorruptChunk) and self.runtime is not None:
            for link in self.links.values():
                link.report_damage(self.runtime.engine)

    def _crop(self, num_tokens: int) -> None:
        assert self.runtime is not None
        for index, sequence in self.runtime.layers.items():
            if sequence.num_tokens > num_tokens:
                self.runtime.crop(index, num_tokens)

    def _undo(self, cause: BaseException) -> None:
        """Bring every layer back to the length it had when the step began."""
        try:
            if self._step_tokens == 0:
                self._drop_runtime()  # the next prompt may have another shape
            else:
                self._crop(self._step_tokens)
        except Exception as error:
            cause.add_note(f"undoing the step failed as well: {error}")
            self._torn_by = cause
        if not self.can_undo:
            self._torn_by = cause
