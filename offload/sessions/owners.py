"""Who uses a root, and who has died: a locked file for each user of it."""

import fcntl
import os
from pathlib import Path

from offload.tiers.syscalls import as_storage_error


class OwnerLock:
    """A file that is locked as long as its owner lives.

    The kernel drops the lock with the process, however it ends, so no clock and no pid can
    deceive. A child made by ``fork`` keeps the lock of its parent until it ends or calls ``exec``.

    Make it inside a transaction of the catalog: between the making and the locking of the file,
    others would take its owner for dead.

    Parameters
    ----------
    path : Path

    Raises
    ------
    DiskFull, StorageError
        The file cannot be made or locked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise as_storage_error(error, f"cannot lock {path}") from error

    def close(self) -> None:
        """Say that the owner is gone. Idempotent."""
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def is_alive(path: Path) -> bool:
    """Whether somebody holds the lock of an owner. Ask inside a transaction of the catalog.

    Raises
    ------
    StorageError
        It cannot be told.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise as_storage_error(error, f"cannot open {path}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        raise as_storage_error(error, f"cannot lock {path}") from error
    finally:
        os.close(fd)
    return False
