"""What we need of FAISS besides its indexes: the module, threads, bytes.

FAISS is imported when it is first used, so that everything else works without it. It brings an
OpenMP runtime and a BLAS of its own beside torch's: if both used all cores in nested loops, each
would wait for the other. So FAISS runs on threads of ours only, one OpenMP thread in each; its
thread number is a property of the calling thread, and neither torch's nor that of the caller's own
FAISS changes. FAISS releases the GIL while it works. Its CPU indexes may be searched by any number
of threads, as long as nobody sets their attributes: what varies goes into ``SearchParameters``.
"""

import importlib
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.errors import ConfigError

_MAX_WORKERS = 8

_lock = threading.Lock()
# Weak, so that the threads end with the last index that uses them.
_shared: weakref.WeakValueDictionary[str, ThreadPoolExecutor] = weakref.WeakValueDictionary()
# Threads do not survive a fork; the child makes its own.
os.register_at_fork(after_in_child=_shared.clear)


def faiss_module() -> Any:
    """Return the module ``faiss``.

    Raises
    ------
    ConfigError
        It is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ConfigError(
            "this index needs the module faiss: install the package faiss-cpu, or faiss-gpu "
            f"instead of it ({error})"
        ) from error


def shared_workers() -> ThreadPoolExecutor:
    """Return the threads that FAISS runs on; they live as long as somebody keeps the result."""
    with _lock:
        workers = _shared.get("workers")
        if workers is None:
            count = min(_MAX_WORKERS, os.cpu_count() or 1)
            workers = ThreadPoolExecutor(count, "offload-faiss", _use_one_thread)
            _shared["workers"] = workers
        return workers


def _use_one_thread() -> None:
    faiss_module().omp_set_num_threads(1)


def to_bytes(index: Any) -> Tensor:
    """Serialise an index of FAISS, uint8 [num_bytes]."""
    return torch.from_numpy(faiss_module().serialize_index(index))


def from_bytes(data: Tensor) -> Any:
    """Return the index that ``to_bytes`` was given; a copy of what the bytes hold."""
    return faiss_module().deserialize_index(np.ascontiguousarray(data.cpu().numpy()))
