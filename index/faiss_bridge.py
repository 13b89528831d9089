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
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from offload.errors import ConfigError

_T = TypeVar("_T")
_R = TypeVar("_R")

_MAX_WORKERS = 8


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


class Workers:
    """The threads that FAISS runs on, until nobody keeps this; a forked child gets its own."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin with no threads; they start as they are needed."""
        count = min(_MAX_WORKERS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(count, "offload-faiss", _use_one_thread)

    def submit(self, work: Callable[..., _R], *args: object) -> Future[_R]:
        """Run on one of the threads."""
        return self._pool.submit(work, *args)

    def map(self, work: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
        """Run for each of the items, and return what comes out in their order."""
        return list(self._pool.map(work, items))


_lock = threading.Lock()
# Weak, so that the threads end with the last index that uses them.
_shared: weakref.WeakValueDictionary[str, Workers] = weakref.WeakValueDictionary()


def shared_workers() -> Workers:
    """Return the threads that all indexes of this process share."""
    with _lock:
        workers = _shared.get("workers")
        if workers is None:
            workers = _shared["workers"] = Workers()
        return workers


def _after_fork() -> None:
    """Let a child go on with the indexes it inherited: the threads that searched them are gone."""
    for workers in _shared.values():
        workers.renew()
    _lock.release()


if hasattr(os, "register_at_fork"):  # Windows does not fork.
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork
    )


def _use_one_thread() -> None:
    faiss_module().omp_set_num_threads(1)


def to_bytes(index: Any) -> Tensor:
    """Serialise an index of FAISS, uint8 [num_bytes]."""
    return torch.from_numpy(faiss_module().serialize_index(index))


def from_bytes(data: Tensor) -> Any:
    """Return the index that ``to_bytes`` was given; a copy of what the bytes hold."""
    return faiss_module().deserialize_index(np.ascontiguousarray(data.cpu().numpy()))
