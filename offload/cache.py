"""``OffloadedCache``: a transformers cache that lives on several tiers."""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from offload import attention, masks, resume
from offload.core import CacheCore
from offload.errors import ConfigError
from offload.layers import OffloadedLayer, offloaded
from offload.masks import MaskLength
from offload.presets import Preset, customised
from offload.session_link import SessionLink
from offload.sessions.listing import SessionInfo
from offload.sessions.store import SessionStore
from offload.settings import CacheOptions, check_settings
from offload.stats import CacheStats
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
        Ordered, non-empty subset of ``["gpu", "cpu", "disk", "remote"]``. ``"gpu"`` is the device
        of the model, also where that is the CPU; ``"remote"`` needs ``"disk"``.
    policy : str or Preset
        ``"exact"``: every query attends to every key. ``"adaptive"``: decoding reads the keys that
        matter and estimates the others. More in ``docs/retrieval.md``; ``presets.customised``
        changes what a policy does.
    budget : float or int, optional
        What a sparse policy reads per query: a share of the context, or a number of tokens.
    error : float, optional
        Let ``"adaptive"`` read as little as keeps the relative error of nine in ten answers below
        this; the budget is then the most that it reads.
    max_wait_us : float, optional
        Longest wait of a layer, at each step, for what a sparse policy reads from the disk; what is
        late is estimated. By default everything is waited for.
    codec : str or mapping of str to str
        How the disk stores keys and values: ``"raw"``, the lossless ``"bf16x"``, or ``"int8"``,
        ``"fp8"``, ``"kivi4"``, ``"kivi2"`` (``docs/codecs.md``); ``"auto"`` measures the disk and
        encodes as much as makes reading faster, without loss for a policy that reads everything.
        ``"importance"``: chunks that leave memory in the fewer bits, the less they matter. A
        mapping says it per tier: with ``{"cpu": "kivi4"}`` the host holds codes, two to five times
        as many tokens, and attends to them as they are.
    placement : str
        ``"first"``: chunks stay in the tier they were put in. ``"mass"`` and others, for sparse
        policies: those that get attention come up from the disk (``docs/placement.md``).
    capacity : mapping of str to int or str, optional
        Hard limit per tier, such as ``{"gpu": "2GiB", "cpu": "8GiB", "disk": "200GiB"}``. Tiers
        that are not named get a share of what is free, never more than half.
    disk_path : path, optional
        Folder for the disk tier; a private folder is made inside and removed on ``close``. Default:
        the user's cache folder.
    remote_url : str, optional
        Where the tier ``"remote"`` writes, such as ``"s3://bucket/prefix"`` (``docs/remote.md``).
    encrypted : bool
        Encrypt what the disk tier writes, with a key of this process that is written nowhere
        (``docs/encryption.md``). A cache that is loaded from an encrypted store always does.
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
        policy: str | Preset = "exact",
        budget: float | int | None = None,
        error: float | None = None,
        max_wait_us: float | None = None,
        codec: str | Mapping[str, str] = "raw",
        placement: str = "first",
        capacity: Mapping[str, int | str] | None = None,
        disk_path: str | Path | Sequence[str | Path] | None = None,
        remote_url: str | None = None,
        encrypted: bool = False,
        chunk_tokens: int = 64,
        config: Any = None,
    ) -> None:
        preset = customised(policy, budget=budget, error=error, max_wait_us=max_wait_us)
        how = (codec, placement, remote_url, encrypted)
        settings = check_settings(tiers, preset, capacity, disk_path, chunk_tokens, *how)
        self._adopt(CacheCore(settings), [])
        if config is not None:
            try:
                self.bind(config)
            except BaseException:
                self.close()
                raise

    layers: list[Any]
    token_ids: Tensor | None
    """Token ids of a session that was saved or loaded with them, int64 [num_rows, num_tokens]."""
    _bound: bool
    _config: Any
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
        self._config = config
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

    @property
    def offloads(self) -> bool:
        """Whether any layer is offloaded; true while the model is unknown."""
        return not self._bound or any(isinstance(layer, OffloadedLayer) for layer in self.layers)

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
        return self._core.stats()

    @property
    def disk_folder(self) -> Path | None:
        """The private folder of the disk tier; None without one."""
        scratch = self._core.config.scratch
        return None if scratch is None else scratch.path

    def fork(self) -> Self:
        """Return a copy-on-write copy: chunks are shared, only the tails are copied."""
        return copy.deepcopy(self)

    def save(
        self,
        name: str,
        *,
        store: SessionStore | str | Path | None = None,
        model: PreTrainedModel | None = None,
        weights_id: str | None = None,
        token_ids: Tensor | None = None,
        ttl_s: float | None = None,
        pin: bool = False,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> SessionInfo:
        """Save the cache as a session, which any process can ``load``.

        A session of that name is replaced. Chunks that the store has already are not written again,
        so saving after every turn costs what the turn has added. The cache can be used on.

        Parameters
        ----------
        name : str
        store : SessionStore or path, optional
            Where to; default: the store this cache came from, else ``SessionStore()``.
        model : PreTrainedModel, optional
            The model that filled the cache. By default it is looked for.
        weights_id : str, optional
            Names the weights, such as a revision; instead of a digest of all of them.
        token_ids : Tensor, int [num_rows, num_tokens or more], optional
            What the model was given, from the first token on, all of it attended to (no padding).
            Kept with the session, and other prompts that begin alike then share the chunks.
        ttl_s : float, optional
            Seconds after which the session expires.
        pin : bool
            Never evict the session to make room for others.
        progress : callable
            Told chunks written and chunks to write.

        Raises
        ------
        ConfigError
            The cache is empty, or the name, tokens or model do not fit.
        DiskFull, StorageError, TransferTimeout
            Such as: the quota has no room. Nothing was saved, earlier sessions are as before.
        """
        found = resume.the_model(model, self._config)
        info, self.token_ids = resume.save(
            self._core, self.layers, name, store, found, weights_id, token_ids, ttl_s, pin, progress
        )
        return info

    @classmethod
    def load(
        cls,
        name: str,
        model: PreTrainedModel,
        *,
        store: SessionStore | str | Path | None = None,
        tiers: Sequence[str] = ("gpu", "cpu", "disk"),
        weights_id: str | None = None,
        **options: Unpack[CacheOptions],
    ) -> Self:
        """Return a cache that goes on where a session was saved.

        Nothing but the growing chunks is read now: the others are, each when it is first attended
        to, from where they lie. ``token_ids`` of the cache are those that were saved.

        Parameters
        ----------
        name : str
        model : PreTrainedModel
            The one that the cache is for; it must be equal to the one that filled it.
        store : SessionStore or path, optional
        tiers : sequence of str
            ``"disk"`` must be among them.
        weights_id : str, optional
            As for ``save``.
        **options
            As for the class; all but ``tiers``, ``chunk_tokens`` and ``config``.

        Raises
        ------
        SessionNotFound
        NamespaceMismatch
            Another model, dtype or tenant made the session; names the first field that differs.
        CorruptChunk
            The session is damaged.
        """
        if "disk" not in tiers:
            raise ConfigError(f"a session is read from disk; add 'disk' to tiers={list(tiers)}")
        opened, owns, file, held = resume.open_session(store, name, model, weights_id)
        try:
            tokens = file.layout.chunk_tokens
            options["encrypted"] = options.get("encrypted", False) or opened.is_encrypted
            cache = cls(tiers, chunk_tokens=tokens, config=model.config, **options)
        except BaseException:
            held.release()
            if owns:
                opened.close()
            raise
        try:
            link = SessionLink(opened, owns_store=owns)
            cache._core.links[link.key] = link
            resume.restore(cache._core, cache.layers, link, file, held, model.device)
        except BaseException:
            cache.close()
            raise
        cache.token_ids = file.token_ids
        return cache

    def reuse(
        self,
        token_ids: Tensor,
        model: PreTrainedModel,
        *,
        store: SessionStore | str | Path | None = None,
        weights_id: str | None = None,
    ) -> int:
        """Fill this empty cache with chunks that some session has for the beginning of a prompt.

        Give ``generate`` the whole prompt afterwards: the model runs on what is missing. Chunks are
        read and verified here; what is damaged is set aside, and computed again.

        Parameters
        ----------
        token_ids : Tensor, int [num_rows, num_tokens] or [num_tokens]
            The prompt, without padding.
        model : PreTrainedModel
        store : SessionStore or path, optional
        weights_id : str, optional
            As for ``save``.

        Returns
        -------
        int
            Tokens per row that need no prefill: whole chunks, less than the prompt; 0 for models
            with layers of bounded size (sliding windows, recurrent states).

        Raises
        ------
        ConfigError
            The cache is not empty, or ``token_ids`` are no tokens.
        """
        if self._core.runtime is not None:
            raise ConfigError(f"reuse() is for an empty cache; this holds {self.get_seq_length()}")
        self.bind(model.config)
        return resume.reuse(self._core, self.layers, store, token_ids, model, weights_id)

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
        self._finalizer.detach()
        self._core.close()

    def check_integrity(self) -> None:
        """Raise AssertionError if a chunk is lost, shared wrongly, or a tier is over capacity."""
        if self._core.runtime is not None:
            self._core.runtime.check_integrity()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy-on-write fork: chunks are shared, only the tails are copied."""
        fork = type(self).__new__(type(self))
        fork._adopt(self._core.fork(), [])
        fork._bound, fork._config = self._bound, self._config
        fork._records_past, fork.token_ids = self._records_past, self.token_ids
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

    def __exit__(self, *failure: object) -> None:
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
        self._config = None
        self._records_past = False
        self.token_ids = None
        # Does not hold the cache itself, so that dropping the last reference closes it.
        self._finalizer = weakref.finalize(self, core.abandon)
