"""Start workers by way of a launcher, and end them."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from offload.errors import ConfigError, StorageError
from offload.tiers.near.launcher import PID

_LAST_WAIT_S = 10.0

_FIRST_WAIT_S = 60.0
"""Longest time for a launcher to load everything and fork."""


class WorkerProcess:
    """A process that is nobody's child here, held by a descriptor, so that no other is ever meant.

    Parameters
    ----------
    pid : int
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def kill(self) -> None:
        """End it, if it has not ended. Any thread may call."""
        with contextlib.suppress(OSError, ValueError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def close(self) -> None:
        """Wait until it has ended, then let go of it. Idempotent.

        Not for ever: one that is stuck in a dead disk ends when the system lets it.
        """
        if self._fd >= 0:
            poll = select.poll()  # ``select`` knows the first 1024 descriptors only
            poll.register(self._fd, select.POLLIN)
            poll.poll(1000 * _LAST_WAIT_S)
            os.close(self._fd)
            self._fd = -1


class Launcher:
    """Starts workers; there is one for all tiers of this process, as long as any is open.

    Any thread may call any method.
    """

    _shared: "Launcher | None" = None
    _users = 0
    _sharing = threading.Lock()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start_launcher()

    @classmethod
    def acquire(cls) -> "Launcher":
        """Return the launcher of this process; ``release`` it after use.

        Raises
        ------
        ConfigError
            The platform has no descriptors of processes.
        """
        if not hasattr(os, "pidfd_open"):
            raise ConfigError(f"storage workers need Linux; this is {sys.platform}")
        with cls._sharing:
            if cls._shared is None:
                cls._shared = cls()
            cls._users += 1
            return cls._shared

    @classmethod
    def release(cls) -> None:
        """Undo one ``acquire``; the last one ends the launcher."""
        with cls._sharing:
            cls._users -= 1
            if not cls._users and cls._shared is not None:
                cls._shared._end()
                cls._shared = None

    def start(self, connection_fd: int, memory_fd: int) -> WorkerProcess:
        """Start a worker that serves a connection over shared memory.

        Raises
        ------
        StorageError
            It could not be started, by a second launcher either.
        """
        with self._lock:
            for is_last in (False, True):
                try:
                    socket.send_fds(self._control, [b"s"], [connection_fd, memory_fd])
                    answer = self._control.recv(PID.size)
                    if len(answer) == PID.size:
                        return WorkerProcess(*PID.unpack(answer))
                except OSError as error:
                    if is_last:
                        raise StorageError(
                            error.errno, f"cannot start a storage worker: {error}"
                        ) from error
                self._end()
                self._start_launcher()
        raise StorageError("cannot start a storage worker: its launcher ended")

    def _start_launcher(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_FIRST_WAIT_S)
        [package] = sys.modules["offload"].__path__
        root = str(Path(package).resolve().parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "offload.tiers.near.launcher", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **threads, "PYTHONPATH": path},
            )
        except OSError as error:
            self._control.close()
            raise StorageError(error.errno, f"cannot start {sys.executable}: {error}") from error
        finally:
            theirs.close()

    def _end(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()
