"""Our disk as a storage backend of SGLang's hierarchical cache, for SGLang 0.5.10 to 0.5.23.

SGLang loads it by name (``dynamic``); see ``docs/plugins.md``. Its calls are made on SGLang's own
backup and prefetch threads and block until the disk has answered or the deadline has passed.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offload.config import parse_size
from offload.errors import ConfigError
from offload.plugins.batch import Batch, Row
from offload.plugins.block_store import BlockStore
from offload.plugins.sglang_pages import namespace_of, places_of, row_of

try:
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorage,
        PoolHitPolicy,
        PoolName,
        PoolTransferResult,
    )
except ImportError as error:
    raise ConfigError(
        "offload.plugins.sglang_hicache is loaded by SGLang 0.5.10 to 0.5.23, and "
        f"cannot be without it: {error}"
    ) from error

_LOG = logging.getLogger(__name__)

_POLL_S = 0.25
"""Between two looks at the deadline, while a caller waits."""

_Results = dict[Any, list[bool]]


class OffloadHiCache(HiCacheStorage):  # type: ignore[misc]  # SGLang is not installed here
    """Pages of SGLang on a bounded, checksummed disk that survives restarts.

    Every pool has a store of its own, opened when SGLang registers the pool; without a registered
    pool, when the first page is moved. Any thread may call any method.

    Parameters
    ----------
    storage_config : HiCacheStorageConfig
        ``extra_config`` holds ``root`` and ``quota``, bytes for the pages of keys and values, and
        may hold ``pool_quota``, bytes for each further pool (a tenth of that), ``num_threads`` and
        ``deadline_s``.
    kwargs : dict, optional
        From SGLang; not used.

    Raises
    ------
    ConfigError
        ``root`` or ``quota`` is missing or impossible, or ranks would have to share pages.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        extra = dict(storage_config.extra_config or {})
        missing = [name for name in ("root", "quota") if name not in extra]
        if missing:
            raise ConfigError(f"extra_config of the SGLang backend lacks {', '.join(missing)}")
        if storage_config.is_mla_model and storage_config.tp_size > 1:
            raise ConfigError(
                f"{storage_config.tp_size} ranks of a model with MLA read the pages of one rank, "
                "and a store of blocks belongs to one process: use one rank or another backend"
            )
        self._root = Path(extra["root"]).expanduser()
        self._quota_bytes = parse_size(extra["quota"])
        self._pool_quota_bytes = parse_size(
            extra.get("pool_quota", max(1, self._quota_bytes // 10))
        )
        self._num_threads = int(extra.get("num_threads", 4))
        self._deadline_s = float(extra.get("deadline_s", 30.0))
        self._config = storage_config
        self._lock = threading.Lock()
        self._stores: dict[str, BlockStore] = {}
        self.registered_pools: dict[Any, Any] = {}

    @property
    def stores(self) -> dict[str, BlockStore]:
        """The stores that are open, by the name of their pool."""
        with self._lock:
            return dict(self._stores)

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Open the store of keys and values."""
        super().register_mem_pool_host(mem_pool_host)
        self._register(PoolName.KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Open the store of a pool."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._register(host_pool_name, host_pool)

    def exists(self, key: str) -> bool:
        """Whether a page can be loaded now."""
        return self._holds(PoolName.KV, key)

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Load a page into a tensor and return it; None if it is not there."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[Any]:
        """Load pages into tensors; None for each that is not there."""
        targets = list(target_locations or [None] * len(keys))
        if any(target is None for target in targets):
            raise ConfigError("pages are loaded into tensors; none was given")
        rows = [row_of(target) for target in targets]
        arrived = self._move(BlockStore.submit_load, PoolName.KV, keys, rows)
        return [target if good else None for target, good in zip(targets, arrived, strict=True)]

    def set(
        self,
        key: str,
        value: Any = None,
        target_location: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Store a page; True once it is on disk."""
        return self.batch_set([key], [target_location if value is None else value])

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Store pages; True once all are on disk."""
        pages = list(target_locations or ()) if values is None else list(values)
        rows = [row_of(page.contiguous()) for page in pages]
        return all(self._move(BlockStore.submit_store, PoolName.KV, keys, rows))

    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Load pages of the pool that was registered first."""
        return self._read(PoolName.KV, self.mem_pool_host, keys, host_indices)

    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Store pages of the pool that was registered first."""
        return self._write(PoolName.KV, self.mem_pool_host, keys, host_indices)

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> _Results:
        """Load pages of several pools; True for each that arrived."""
        return self._each(self._read, transfers)

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> _Results:
        """Store pages of several pools; True for each that is on disk."""
        return self._each(self._write, transfers)

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> Any:
        """Return how many pages from the first one on can be loaded with all that is theirs.

        Raises
        ------
        ConfigError
            A pool asks for a hit policy other than all pages or the trailing ones.
        """
        num_kv = _leading([self._holds(PoolName.KV, key) for key in keys])
        hits = {PoolName.KV: num_kv} if num_kv else {}
        usable = set(range(1, num_kv + 1))
        for transfer in pool_transfers or ():
            held = [self._holds(transfer.name, key) for key in keys[:num_kv]]
            complete = _usable(transfer, held)
            if complete:
                hits[transfer.name] = max(complete)
            usable &= complete
        fields = {"restorable_prefix_pages": sorted(usable)}
        known = {field.name for field in dataclasses.fields(PoolTransferResult)}
        known_fields = {name: fields[name] for name in fields.keys() & known}
        return PoolTransferResult(max(usable, default=0), hits, **known_fields)

    def clear(self) -> bool:
        """Refuse: pages stay until the folder is removed, while no engine has it."""
        _LOG.warning("cannot clear a store in use: stop the engine and remove %s", self._root)
        return False

    def close(self) -> None:
        """Finish or give up what is under way, and let another process have the folders."""
        with self._lock:
            stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            store.close()

    def _holds(self, pool: Any, key: str) -> bool:
        store = self.stores.get(str(pool))
        return store is not None and store.holds(key.encode())

    def _each(self, move: Callable[..., list[bool]], transfers: list[Any]) -> _Results:
        return {
            transfer.name: move(
                transfer.name,
                self.registered_pools[transfer.name],
                transfer.keys or [],
                transfer.host_indices,
            )
            for transfer in transfers
        }

    def _read(self, name: Any, pool: Any, keys: Sequence[str], indices: Any) -> list[bool]:
        places = places_of(pool, keys, indices)
        pages = [pool.get_dummy_flat_data_page() for _ in keys]
        arrived = self._move(BlockStore.submit_load, name, keys, [row_of(page) for page in pages])
        for good, place, page in zip(arrived, places, pages, strict=True):
            if good:
                pool.set_from_flat_data_page(place, page)
        return arrived

    def _write(self, name: Any, pool: Any, keys: Sequence[str], indices: Any) -> list[bool]:
        pages = [pool.get_data_page(place, flat=True) for place in places_of(pool, keys, indices)]
        rows = [row_of(page.contiguous()) for page in pages]
        return self._move(BlockStore.submit_store, name, keys, rows)

    def _move(
        self,
        submit: Callable[[BlockStore, Sequence[bytes], Sequence[Row]], Batch],
        pool: Any,
        keys: Sequence[str],
        rows: Sequence[Row],
    ) -> list[bool]:
        if not keys:
            return []
        store = self._store_of(pool, len(rows[0]))
        batch = submit(store, [key.encode() for key in keys], rows)
        while not batch.wait(_POLL_S):
            store.poll()
        return batch.results

    def _register(self, name: Any, pool: Any) -> None:
        self._store_of(name, pool.get_dummy_flat_data_page().nbytes)

    def _store_of(self, pool: Any, row_bytes: int) -> BlockStore:
        with self._lock:
            store = self._stores.get(str(pool))
            if store is None:
                is_main = str(pool) == str(PoolName.KV)
                store = self._stores[str(pool)] = BlockStore(
                    self._root,
                    namespace_of(self._config, str(pool), row_bytes),
                    quota_bytes=self._quota_bytes if is_main else self._pool_quota_bytes,
                    num_threads=self._num_threads,
                    deadline_s=self._deadline_s,
                )
            return store


def _leading(held: Sequence[bool]) -> int:
    return held.index(False) if False in held else len(held)


def _usable(transfer: Any, held: Sequence[bool]) -> set[int]:
    """Return the prefix lengths for which a pool has all that its policy asks for."""
    if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
        return set(range(1, _leading(held) + 1))
    if transfer.hit_policy != PoolHitPolicy.TRAILING_PAGES:
        raise ConfigError(f"the hit policy {transfer.hit_policy} is not supported")
    last = max(1, len(transfer.keys or ()))
    return {end for end in range(1, len(held) + 1) if all(held[max(0, end - last) : end])}
