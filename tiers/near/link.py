"""The other end of a worker: starts it, talks to it, and starts it again when it dies."""

import contextlib
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from offload.errors import ClosedError, StorageError, TransferTimeout
from offload.tiers.near.launching import Launcher, WorkerProcess
from offload.tiers.near.messages import Adopt, Body, Reply, Request, WorkerConfig
from offload.tiers.near.shared_memory import SharedMemory

_LOG = logging.getLogger(__name__)

_START_S = 60.0
"""Longest time for a process to start; no measure of how long a request may take."""

_MOST_ATTEMPTS = 2
"""A request in the course of which two workers died is not given to a third."""

Known = dict[int, Any]
"""What the process at the other end was told; a new one was told nothing."""

Make = Callable[[Known], Body]
"""Makes a request for a process that knows this, and notes what it will know."""


@dataclass(slots=True, eq=False)
class _Pending:
    what: str
    make: Make
    future: "Future[Any]"
    sent_at: float = field(default_factory=time.monotonic)
    attempts: int = 0


class WorkerLink:
    """One worker process, kept alive.

    When it dies, or leaves a request unanswered for ``patience_s`` and is killed for it, another
    one takes over its files, and what was pending is asked again, once. Any thread may call.

    Parameters
    ----------
    config : WorkerConfig
    adopt : callable
        Returns the slots that a new process has to know, and what their records are about.
    patience_s : float
        Longest time for one request.

    Raises
    ------
    ConfigError
        The process refuses its configuration.
    StorageError
        It cannot be started.

    Attributes
    ----------
    memory : SharedMemory
    num_restarts : int
    """

    def __init__(
        self, config: WorkerConfig, adopt: Callable[[], Adopt], patience_s: float = 30.0
    ) -> None:
        self.config = config
        self.num_restarts = 0
        self._adopt = adopt
        self._patience_s = patience_s
        self._numbers = itertools.count()
        self._pending: dict[int, _Pending] = {}
        self._lock = threading.Lock()
        """Guards ``_pending`` and ``_closed``; never held while sending."""
        self._sending = threading.RLock()
        """Guards the process, its connection and what it knows."""
        self._closed = False
        self._lost: str | None = None
        """Why there is no process any more."""
        self._is_late = False
        """Whether the process is ended for not answering."""
        self._known: Known = {}
        self._has_ended = False
        self.memory = SharedMemory(config.shared_bytes)
        try:
            self._launcher = Launcher.acquire()
            try:
                self._process, self._connection = self._start()
            except BaseException:
                Launcher.release()
                raise
        except BaseException:
            self.memory.close()
            raise
        self._thread = threading.Thread(
            target=self._listen, name=f"offload-{config.name}", daemon=True
        )
        self._thread.start()

    @property
    def pid(self) -> int:
        """Of the process that serves now."""
        return self._process.pid

    def ask(self, what: str, make: Make) -> "Future[Any]":
        """Send a request.

        Parameters
        ----------
        what : str
            Names it in errors.
        make : callable
            Called again for each process that is asked.

        Returns
        -------
        Future
            Its result is what the worker answered. Raises what the worker raised; StorageError if
            two of them died over it; TransferTimeout if they did not answer.
        """
        pending = _Pending(what, make, Future())
        with self._lock:
            if self._closed:
                raise ClosedError(f"{what}: the disk tier is closed")
            if self._lost is not None:
                raise StorageError(f"{what}: {self._lost}")
            number = next(self._numbers)
            self._pending[number] = pending
        with self._sending:
            if not pending.attempts:  # else a process that just started was asked already
                self._send(number, pending)
        return pending.future

    def close(self) -> None:
        """End the process and the thread; what is pending fails. Idempotent."""
        with self._lock:
            self._closed = True
            if self._has_ended:
                return
            self._has_ended = True
        self._process.kill()  # it owns nothing that another would not find; frees who sends to it
        with self._sending:
            self._process.kill()  # the one that was being started, if one was
        self._thread.join()
        self._end_process()
        self._fail_all(ClosedError, "the disk tier was closed")
        self.memory.close()
        Launcher.release()

    def _send(self, number: int, pending: _Pending) -> None:
        """Send a request; whoever calls holds ``_sending``."""
        pending.sent_at = time.monotonic()
        pending.attempts += 1
        body = pending.make(self._known)
        # If it died, the listening thread sees that, and asks the next one.
        with contextlib.suppress(OSError):
            self._connection.send(Request(number, body))

    def _listen(self) -> None:
        while True:
            reply = self._next_reply()
            if reply is not None:
                self._complete(reply)
                continue
            with self._lock:
                if self._closed:
                    return
            try:
                self._revive()
            except Exception as error:  # without a worker, whoever waits must be told
                _LOG.exception("cannot restart %s", self.config.name)
                reason = f"cannot restart {self.config.name}: {error}"
                with self._lock:
                    self._lost = reason
                self._fail_all(StorageError, reason)
                return

    def _next_reply(self) -> Reply | None:
        """Return the next reply; None when the process has died or is too late."""
        try:
            while not self._connection.poll(self._patience_left()):
                if self._patience_left() <= 0:
                    late = [each.what for each in list(self._pending.values())]
                    _LOG.warning(
                        "%s (pid %d) has not answered for %g s: %s",
                        self.config.name,
                        self._process.pid,
                        self._patience_s,
                        "; ".join(late[:3]),
                    )
                    self._is_late = True
                    return None
            reply: Reply = self._connection.recv()
        except (EOFError, OSError):
            return None
        return reply

    def _patience_left(self) -> float:
        with self._lock:
            oldest = min((each.sent_at for each in self._pending.values()), default=None)
        now = time.monotonic()
        return self._patience_s if oldest is None else max(0.0, oldest + self._patience_s - now)

    def _complete(self, reply: Reply) -> None:
        with self._lock:
            pending = self._pending.pop(reply.number, None)
        if pending is None:
            return
        if reply.error is None:
            pending.future.set_result(reply.value)
        else:
            pending.future.set_exception(reply.error)

    def _revive(self) -> None:
        is_hung, self._is_late = self._is_late, False
        self._process.kill()  # before the lock: somebody may be stuck sending to it
        with self._sending:
            self._end_process()
            with self._lock:
                if self._closed:
                    return
            how = "was killed, because it did not answer" if is_hung else "died"
            _LOG.warning("%s %s; starting another", self.config.name, how)
            self._process, self._connection = self._start()
            self._known = {}
            self.num_restarts += 1
            adopt = self._adopt()
            with contextlib.suppress(OSError):  # as in ``_send``
                self._connection.send(Request(-2, adopt))
            with self._lock:
                left = dict(self._pending)
            for number, pending in left.items():
                if pending.attempts >= _MOST_ATTEMPTS:
                    self._give_up(number, pending, how, is_late=is_hung)
                else:
                    self._send(number, pending)

    def _give_up(self, number: int, pending: _Pending, how: str, *, is_late: bool) -> None:
        with self._lock:
            self._pending.pop(number, None)
        message = f"{pending.what}: {self.config.name} {how}, {_MOST_ATTEMPTS} times"
        pending.future.set_exception(TransferTimeout(message) if is_late else StorageError(message))

    def _fail_all(self, kind: type[Exception], reason: str) -> None:
        with self._lock:
            left, self._pending = self._pending, {}
        for pending in left.values():
            pending.future.set_exception(kind(f"{pending.what}: {reason}"))

    def _start(self) -> "tuple[WorkerProcess, Connection[Any, Any]]":
        ours, theirs = socket.socketpair()
        try:
            process = self._launcher.start(theirs.fileno(), self.memory.fd)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        connection: Connection[Any, Any] = Connection(ours.detach())
        try:
            self._greet(connection)
        except BaseException:
            process.kill()
            process.close()
            connection.close()
            raise
        return process, connection

    def _greet(self, connection: "Connection[Any, Any]") -> None:
        """Tell a new process what it is for, and wait until it serves."""
        name = self.config.name
        try:
            connection.send(self.config)
            reply: Reply | None = connection.recv() if connection.poll(_START_S) else None
        except (EOFError, OSError) as error:
            raise StorageError(f"{name} ended before it served") from error
        if reply is None:
            raise StorageError(f"{name} has not started within {_START_S:g} s")
        if reply.error is not None:
            raise reply.error

    def _end_process(self) -> None:
        self._process.kill()
        self._process.close()
        self._connection.close()
