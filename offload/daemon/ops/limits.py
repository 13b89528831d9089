"""How much one key may have under way at a time."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from offload.daemon.errors import QueueFull
from offload.daemon.ops.tenants import Tenant

_RETRY_AFTER_S = 1.0


class InFlight:
    """Counts the requests of each key. Any thread.

    Parameters
    ----------
    limit : callable
        How many one key may have; asked for each request, so that a reload changes it.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._num_running: Counter[str] = Counter()

    @property
    def num_running(self) -> int:
        """Requests under way, of all keys."""
        with self._lock:
            return self._num_running.total()

    @contextmanager
    def admit(self, tenant: Tenant) -> Iterator[None]:
        """Count a request for as long as it is computed.

        Raises
        ------
        QueueFull
            The key has as many as it may.
        """
        key, limit = tenant.key_name or tenant.name, self._limit()
        with self._lock:
            if self._num_running[key] >= limit:
                message = (
                    f"{self._num_running[key]} requests of this key are under way; limit {limit}"
                )
                raise QueueFull(message, _RETRY_AFTER_S)
            self._num_running[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_running[key] -= 1
                if not self._num_running[key]:
                    del self._num_running[key]
