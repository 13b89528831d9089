"""Where things lie below the root folder of a session store."""

import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from offload.errors import ConfigError, CorruptCatalog
from offload.tiers.scratch import default_parent
from offload.tiers.syscalls import as_storage_error

_IDENTITY = re.compile(r"[0-9a-f]{32}")
_DATA_FILE = re.compile(r"[0-9a-f]{32}\.(kvseg|kvsession)(\.tmp)?")
_OWNER_LOCK = re.compile(r"[0-9a-f]{32}\.lock")
_SHARD = re.compile(r"[0-9a-f]{2}")
_FOLDERS = ("segments", "sessions", "owners", "quarantine")
_OF_THE_FILE_SYSTEM = {"lost+found"}
_TMP = ".tmp"
_ADMINISTRATOR = 0


def default_root() -> Path:
    """Return where sessions are kept unless told otherwise: ``sessions`` in the cache folder.

    Raises
    ------
    ConfigError
        The user has no home folder.
    """
    return default_parent() / "sessions"


def is_identity(value: str) -> bool:
    """Whether a text is one that ``new_id`` could have made."""
    return _IDENTITY.fullmatch(value) is not None


def new_id() -> str:
    """Return a random name for a file, 32 hex digits."""
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class RootPaths:
    """The files of one root.

    ``segments/`` and ``sessions/`` are split by the first two digits of the names, 256 folders
    each, so that no folder grows without bound. Nothing a user says becomes part of a path.

    Parameters
    ----------
    root : Path
    """

    root: Path

    @property
    def catalog(self) -> Path:
        """The SQLite database."""
        return self.root / "catalog.sqlite3"

    @property
    def new_catalog(self) -> Path:
        """A database in the making, which a rebuild puts in the place of the other."""
        return self.root / "catalog.sqlite3.new"

    @property
    def quarantine(self) -> Path:
        """Folder of what was found damaged."""
        return self.root / "quarantine"

    @property
    def scratch(self) -> Path:
        """Folder of what goes away with the process that made it."""
        return self.root / "scratch"

    @property
    def rebuild_lock(self) -> Path:
        """Locked by whoever replaces the catalog, and, shared, by whoever uses it."""
        return self.root / "lock"

    def owner(self, owner: str) -> Path:
        """Return the file that a living owner keeps locked."""
        return self.root / "owners" / f"{_checked(owner)}.lock"

    def segment(self, name: str) -> Path:
        """Return the file of a segment."""
        return self.root / "segments" / _checked(name)[:2] / f"{name}.kvseg"

    def session(self, identity: str) -> Path:
        """Return the file of a session."""
        return self.root / "sessions" / _checked(identity)[:2] / f"{identity}.kvsession"

    def make(self) -> None:
        """Make the folders that are missing, for their owner only.

        Raises
        ------
        ConfigError
            The root, or a folder in it, is no folder of this user, or cannot be made.
        """
        try:
            _make_private(self.root)
            entries = set(os.listdir(self.root)) - _OF_THE_FILE_SYSTEM
            if entries and entries.isdisjoint(
                (*_FOLDERS, self.catalog.name, self.rebuild_lock.name)
            ):
                raise ConfigError(
                    f"{self.root} holds {len(entries)} other files and is no session store; name "
                    "an empty or a new folder"
                )
            link, found = self.root.lstat(), self.root.stat()
            if found.st_uid != os.getuid():
                raise ConfigError(f"{self.root} belongs to user {found.st_uid}, not {os.getuid()}")
            if link.st_uid not in (os.getuid(), _ADMINISTRATOR):
                raise ConfigError(f"{self.root} is a link made by user {link.st_uid}")
            if stat.S_IMODE(found.st_mode) & 0o077:
                self.root.chmod(0o700)
            for folder in map(self.root.joinpath, _FOLDERS):
                _make_private(folder)
                found = folder.lstat()
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                    raise ConfigError(f"{folder} is no folder of user {os.getuid()}")
        except OSError as error:
            raise ConfigError(f"cannot use {self.root}: {error.strerror or error}") from error

    def data_files(self) -> Iterator[Path]:
        """Yield every file of a segment or session, the unfinished ones included.

        What is not named like one of ours is none of our business.
        """
        for folder in ("segments", "sessions"):
            for shard in _entries(self.root / folder, _SHARD):
                if shard.is_dir() and not shard.is_symlink():
                    yield from _entries(shard, _DATA_FILE)

    def owner_locks(self) -> list[Path]:
        """Return the files of all owners, the dead ones included."""
        return _entries(self.root / "owners", _OWNER_LOCK)


def make_shard(path: Path) -> None:
    """Make the folder of a file."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise as_storage_error(error, f"cannot make {path.parent}") from error


def temporary(path: Path) -> Path:
    """Return the name under which a file is written before it is published."""
    return path.with_name(path.name + _TMP)


def is_temporary(path: Path) -> bool:
    """Whether a file was never published."""
    return path.name.endswith(_TMP)


def publish(path: Path, *, durable: bool) -> None:
    """Give a finished temporary file its name.

    Parameters
    ----------
    path : Path
        The final name.
    durable : bool
        Make the name survive a power cut.
    """
    try:
        os.replace(temporary(path), path)
        if durable:
            # The folder is one of 256, and may have been made for this file.
            sync_folder(path.parent)
            sync_folder(path.parent.parent)
    except OSError as error:
        raise as_storage_error(error, f"cannot publish {path}") from error


def remove(path: Path) -> None:
    """Remove a file, published or not; it may be gone already."""
    try:
        path.unlink(missing_ok=True)
        temporary(path).unlink(missing_ok=True)
    except OSError as error:
        raise as_storage_error(error, f"cannot remove {path}") from error


def allocated_bytes(path: Path) -> int:
    """Return the bytes a file takes up on the device; 0 if it is gone."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _checked(name: object) -> str:
    if not isinstance(name, str) or not _IDENTITY.fullmatch(name):
        raise CorruptCatalog(f"{name!r} names no file of a session store")
    return name


def _entries(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    except OSError as error:
        raise as_storage_error(error, f"cannot list {folder}") from error


def _make_private(folder: Path) -> None:
    """Make a folder, and all that it lies in, for the owner only, whatever the umask."""
    if not folder.exists():
        _make_private(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
