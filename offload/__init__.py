"""A hierarchical GPU-CPU-disk runtime for the KV cache of large language models."""

from offload.cache import OffloadedCache
from offload.errors import (
    CapacityError,
    ClosedError,
    ConfigError,
    CorruptChunk,
    DiskFull,
    OffloadError,
    StorageError,
    TransferCancelled,
    TransferError,
    TransferTimeout,
)
from offload.stats import CacheStats, TierStats

__version__ = "0.1.0"

__all__ = [
    "CacheStats",
    "CapacityError",
    "ClosedError",
    "ConfigError",
    "CorruptChunk",
    "DiskFull",
    "OffloadError",
    "OffloadedCache",
    "StorageError",
    "TierStats",
    "TransferCancelled",
    "TransferError",
    "TransferTimeout",
    "__version__",
]
