"""Which of several daemons on one machine has which folder: numbered slots, each with a lock."""

import fcntl
import itertools
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from offload.errors import ConfigError

_LOG = logging.getLogger(__name__)
_LOCK: Final = ".lock"
_LOOK_S: Final = 0.2
"""Between two looks for a slot that has become free; a start takes seconds anyway."""


class Slot:
    """A folder that one process has for as long as it lives.

    The kernel drops the lock with the process, however it ends, so whoever comes next takes over
    the folder of a dead one, with all that is saved in it. The folder has to be on a local disk.

    Parameters
    ----------
    number : int
    path : Path
    descriptor : int
        Of the locked file.
    """

    def __init__(self, number: int, path: Path, descriptor: int) -> None:
        self.number = number
        self.path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """Leave the folder to others. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def claim_slot(data_path: Path, count: int, wait_s: float) -> Slot:
    """Return the first slot that nobody has. Any thread; may block.

    While a new replica replaces an old one there are more processes than slots for a moment. The
    new one waits for the folder of the old one, because the sessions are in there. If nobody leaves
    in time, it gets a folder beyond.

    Parameters
    ----------
    data_path : Path
        Holds ``replica-0``, ``replica-1``, …; made, private, if it is missing.
    count : int
        Slots that there should be.
    wait_s : float
        Longest wait for one of these, in seconds.

    Raises
    ------
    ConfigError
        The folder cannot be used.
    """
    deadline = time.monotonic() + wait_s
    while (slot := _first_free(data_path, range(count))) is None and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    if slot is None:
        _LOG.warning("all %d slots of %s are taken after %g s", count, data_path, wait_s)
        slot = _first_free(data_path, itertools.count(count))
    assert slot is not None  # there is no last number
    return slot


def _first_free(data_path: Path, numbers: Iterable[int]) -> Slot | None:
    return next(filter(None, (_try_claim(data_path, number) for number in numbers)), None)


def _try_claim(data_path: Path, number: int) -> Slot | None:
    path = data_path / f"replica-{number}"
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        data_path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path / _LOCK, flags, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(f"cannot lock {path / _LOCK}: {error.strerror}") from error
    return Slot(number, path, descriptor)
