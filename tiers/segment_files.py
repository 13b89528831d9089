"""The files of append-only segments: made, opened, punched and removed."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.errors import ConfigError
from offload.tiers.punch import CANNOT_PUNCH, punch_hole
from offload.tiers.syscalls import as_storage_error
from offload.types import PAGE_BYTES

_LOG = logging.getLogger(__name__)

_SUFFIX = ".kvseg"


class SegmentFiles:
    """The files of the segments of one tier, in one directory.

    A file is opened for each operation: 3 µs against the 100 µs and more that the operation takes,
    and no number of segments can use up the file descriptors. Names are made of a random token of
    this object and a number, so two tiers may share a directory. Any thread may call any method.

    Parameters
    ----------
    directory : Path
        Made, for the owner only, if it is missing.
    token : str, optional
        Of an earlier object whose files are to be found again; a new one unless given.

    Raises
    ------
    ConfigError
        The directory cannot be made or used.
    """

    def __init__(self, directory: Path, token: str | None = None) -> None:
        self.directory = directory
        self._token = secrets.token_hex(4) if token is None else token
        self._paths: dict[int, Path] = {}
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            block_bytes = os.statvfs(directory).f_frsize
        except OSError as error:
            raise ConfigError(f"cannot use {directory}: {error.strerror}") from error
        # Records start on pages, and a hole gives back whole file system blocks only.
        self._can_punch = PAGE_BYTES % block_bytes == 0

    def path(self, segment: int) -> Path:
        """Return the file of a segment."""
        path = self._paths.get(segment)
        if path is None:  # kept, because making one takes longer than opening the file
            path = self.directory / f"{self._token}-{segment:010d}{_SUFFIX}"
            self._paths[segment] = path
        return path

    def adopt(self, segment: int, path: Path) -> None:
        """Give a number to a file of somebody else, to be read only."""
        self._paths[segment] = path

    def forget(self, segment: int) -> Path:
        """Forget the file of a segment, which stays; return it."""
        return self._paths.pop(segment)

    @contextmanager
    def open(self, segment: int, *, writing: bool, direct: bool) -> Iterator[int]:
        """Open the file of a segment, made if it is to be written.

        Raises
        ------
        StorageError
            It cannot be opened.
        """
        flags = os.O_RDWR | os.O_CREAT if writing else os.O_RDONLY
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        path = self.path(segment)
        try:
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise as_storage_error(error, f"cannot open {path}") from error
        try:
            yield fd
        finally:
            os.close(fd)

    def punch(self, segment: int, offset: int, num_bytes: int) -> bool:
        """Give the space of a range back to the file system; False if it cannot."""
        if not self.path(segment).exists():
            return True  # never written
        if not self._can_punch:
            return False
        with self.open(segment, writing=True, direct=False) as fd:
            code = punch_hole(fd, offset, num_bytes)
        if code == 0:
            return True
        if code in CANNOT_PUNCH:
            self._can_punch = False
        _LOG.warning(
            "cannot punch holes into %s (%s): space of dead records comes back by whole segments",
            self.directory,
            os.strerror(code),
        )
        return False

    def unlink(self, segment: int) -> None:
        """Remove the file of a segment, if it was ever written.

        Raises
        ------
        StorageError
            It cannot be removed.
        """
        path = self.path(segment)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise as_storage_error(error, f"cannot remove {path}") from error
        self._paths.pop(segment, None)
