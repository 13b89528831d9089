"""A private folder that goes away with its process, however the process ends."""

import atexit
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from offload.errors import ConfigError, StorageError

_LOG = logging.getLogger(__name__)

_NAME = re.compile(r"offload-\d+-[0-9a-f]{16}")
_LOCK = "lock"
_PARENT_LOCK = ".offload-lock"


class ScratchDir:
    """A folder ``<parent>/offload-<pid>-<random>`` for this process alone, mode 0700.

    It is removed by ``close``, at exit, or, after a process was killed, by the next ``ScratchDir``
    in the same parent. A lock held on a file inside says that the owner lives; the kernel drops it
    with the process, so a reused pid deceives nobody. Use it from one thread.

    Parameters
    ----------
    parent : Path, optional
        Made if it is missing. The user's cache folder unless given.

    Raises
    ------
    ConfigError
        The parent cannot be made, written or locked.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self.parent = default_parent() if parent is None else parent
        self.path = self.parent / f"offload-{os.getpid()}-{secrets.token_hex(8)}"
        self._owner_pid = os.getpid()
        try:
            self.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.parent):
                self.path.mkdir(mode=0o700)
                self._lock_fd = _lock(self.path / _LOCK)
        except OSError as error:
            raise ConfigError(
                f"cannot make a scratch folder in {self.parent}: {error.strerror or error}"
            ) from error
        self._is_open = True
        atexit.register(self.close)
        _remove_stale(self.parent)

    def close(self) -> None:
        """Remove the folder and all that is in it. Idempotent.

        In a forked child this does nothing: the folder is its parent's.

        Raises
        ------
        StorageError
            Something in it cannot be removed. The next ``ScratchDir`` will try again.
        """
        atexit.unregister(self.close)
        if self._is_open and os.getpid() == self._owner_pid:
            self._is_open = False
            _remove(self.path, self._lock_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def default_parent() -> Path:
    """Return ``offload-kv`` in the user's cache folder.

    Raises
    ------
    ConfigError
        The user has no home folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the specification says to ignore such a value
        try:
            cache = Path.home() / ".cache"
        except RuntimeError as error:
            raise ConfigError(f"no folder for the disk tier: {error}; name one") from error
    return cache / "offload-kv"


def _remove_stale(parent: Path) -> None:
    """Remove all folders whose owner is dead. One that cannot be removed is no reason to fail."""
    with _locked(parent), os.scandir(parent) as entries:
        folders = [Path(entry.path) for entry in entries if _is_ours(entry)]
        claimed = [(path, fd) for path in folders if (fd := _try_lock(path / _LOCK)) is not None]
    for path, lock_fd in claimed:
        try:
            _remove(path, lock_fd)
        except StorageError as error:
            _LOG.warning("left over from a dead process: %s", error)


def _is_ours(entry: "os.DirEntry[str]") -> bool:
    return (
        _NAME.fullmatch(entry.name) is not None
        and entry.is_dir(follow_symlinks=False)
        and entry.stat(follow_symlinks=False).st_uid == os.getuid()
    )


@contextmanager
def _locked(parent: Path) -> Iterator[None]:
    """Keep others from judging a folder while its lock is being made or removed."""
    fd = _lock(parent / _PARENT_LOCK, wait=True)
    try:
        yield
    finally:
        os.close(fd)


def _lock(path: Path, *, wait: bool = False) -> int:
    """Open and lock a file, made if missing; return the descriptor that holds the lock."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(fd)
        raise
    return fd


def _try_lock(path: Path) -> int | None:
    """Lock a file if its owner is dead."""
    try:
        return _lock(path)
    except BlockingIOError:
        return None
    except OSError as error:
        _LOG.warning("cannot tell whether the owner of %s lives: %s", path, error)
        return None


def _remove(path: Path, lock_fd: int) -> None:
    """Remove a folder, its lock last, so that what is left after a failure is still locked."""
    try:
        for name in os.listdir(path):
            if name != _LOCK:
                _remove_entry(path / name)
        with _locked(path.parent):
            (path / _LOCK).unlink(missing_ok=True)
            path.rmdir()
    except FileNotFoundError:
        return  # someone else removed it: that is what was wanted
    except OSError as error:
        raise StorageError(error.errno, f"cannot remove {path}: {error.strerror}") from error
    finally:
        os.close(lock_fd)


def _remove_entry(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
