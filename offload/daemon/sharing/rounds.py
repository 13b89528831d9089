"""A thread that does a few things again and again, each after its own time."""

import logging
import random
import threading
import time
from collections.abc import Callable

_LOG = logging.getLogger(__name__)


class Rounds:
    """Calls functions periodically. None of them may take long; what fails is tried next time.

    Parameters
    ----------
    *jobs : (float, callable)
        Seconds between two calls, and what is called. The first comes within that time: processes
        that start together do not go on together.
    """

    def __init__(self, *jobs: tuple[float, Callable[[], object]]) -> None:
        self._jobs = jobs
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="offload-daemon-rounds")

    def start(self) -> None:
        """Start the thread. Once only."""
        self._thread.start()

    def close(self) -> None:
        """End the thread, if it was started. Idempotent."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        now = time.monotonic()
        due = [now + random.uniform(0.0, period_s) for period_s, _ in self._jobs]
        while not self._closing.wait(max(0.0, min(due) - time.monotonic())):
            number = due.index(min(due))
            period_s, job = self._jobs[number]
            due[number] = time.monotonic() + period_s
            try:
                job()
            except Exception:
                _LOG.exception("%s has failed", job)
