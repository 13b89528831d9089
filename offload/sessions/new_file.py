"""A file outside the root that appears when it is complete, and the rests of those that did not."""

import fcntl
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from offload.errors import ConfigError, DiskFull, OffloadError
from offload.tiers.syscalls import as_storage_error

_LOG = logging.getLogger(__name__)

_BUFFER_BYTES = 1 << 20
_UNFINISHED = re.compile(r"\.kv-export-[0-9a-f]{16}\.tmp")


@contextmanager
def new_file(path: Path, *, sync: bool) -> Iterator[BinaryIO]:
    """Open a private file that gets its name when the block ends well, and is gone if it does not.

    It is locked as long as its writer lives. What writers of this user that were killed have left
    in the folder is removed first.

    Parameters
    ----------
    path : Path
        The final name; what has it is replaced.
    sync : bool
        Make the content survive a power cut.

    Raises
    ------
    ConfigError
        Nothing can be written in the folder.
    DiskFull, StorageError
    """
    _remove_abandoned(path.parent)
    unfinished, fd = _create(path.parent)
    lock_fd = os.dup(
        fd
    )  # the lock has to outlast the file, which is closed before it gets its name
    try:
        with open(fd, "wb", buffering=_BUFFER_BYTES) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(fd)
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, OffloadError):
            raise as_storage_error(error, f"export to {path}") from error
        raise
    finally:
        os.close(lock_fd)


def _create(folder: Path) -> tuple[Path, int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        path = folder / f".kv-export-{secrets.token_hex(8)}.tmp"
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            failure = as_storage_error(error, f"cannot write in {folder}")
            raise failure if isinstance(failure, DiskFull) else ConfigError(str(failure)) from error
        with suppress(OSError):  # where nothing can be locked, nothing is taken for abandoned
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # taken for abandoned, before it was locked


def _remove_abandoned(folder: Path) -> None:
    """Remove what nobody writes any more. What cannot be removed is no reason to fail."""
    try:
        with os.scandir(folder) as entries:
            found = [Path(entry.path) for entry in entries if _is_ours(entry)]
        for path in found:
            _remove_if_abandoned(path)
    except OSError as error:
        _LOG.warning("cannot look for abandoned exports in %s: %s", folder, error)


def _is_ours(entry: "os.DirEntry[str]") -> bool:
    return (
        _UNFINISHED.fullmatch(entry.name) is not None
        and entry.is_file(follow_symlinks=False)
        and entry.stat(follow_symlinks=False).st_uid == os.getuid()
    )


def _remove_if_abandoned(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # finished meanwhile
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return  # its writer lives
    finally:
        os.close(fd)
