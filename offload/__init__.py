"""A hierarchical GPU-CPU-disk runtime for the KV cache of large language models."""

from typing import TYPE_CHECKING, Any

from offload.errors import (
    CapacityError,
    ClosedError,
    ConfigError,
    CorruptCatalog,
    CorruptChunk,
    DiskFull,
    NamespaceMismatch,
    OffloadError,
    SessionInUse,
    SessionNotFound,
    StorageError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from offload.stats import CacheStats, TierStats

if TYPE_CHECKING:
    from offload.cache import OffloadedCache
    from offload.sessions.store import SessionStore

__version__ = "0.1.0"

__all__ = [
    "CacheStats",
    "CapacityError",
    "ClosedError",
    "ConfigError",
    "CorruptCatalog",
    "CorruptChunk",
    "DiskFull",
    "NamespaceMismatch",
    "OffloadError",
    "OffloadedCache",
    "SessionInUse",
    "SessionNotFound",
    "SessionStore",
    "StorageError",
    "TierStats",
    "TransferCancelled",
    "TransferError",
    "TransferTimeout",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; whoever wants sizes or errors should not wait for it.
    if name == "OffloadedCache":
        from offload import _compat  # noqa: F401 - refuses transformers it cannot work with
        from offload.cache import OffloadedCache

        return OffloadedCache
    if name == "SessionStore":
        from offload.sessions.store import SessionStore

        return SessionStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
