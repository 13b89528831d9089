"""The key of a folder: 32 random bytes that seal everything, kept sealed with the caller's key.

Whoever changes the caller's key need not write the sessions again; whoever removes the file has
made them unreadable, copies of them included.
"""

import base64
import binascii
import contextlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offload.errors import ConfigError, CorruptChunk
from offload.sessions.paths import RootPaths, sync_folder
from offload.tiers.sealing import KEY_BYTES, Sealer
from offload.tiers.syscalls import as_storage_error

KEY_FILE = "key.json"
VERSION = 1
_KDF = "hkdf-sha256"
_PURPOSE = "root"


def open_key(folder: Path, key: bytes | None, is_new: Callable[[], bool]) -> Sealer | None:
    """Return what seals the content of a folder; None if nothing does.

    Parameters
    ----------
    folder : Path
        That is there; one that is new and opened with a key gets its own.
    key : bytes or None
        Of the caller, ``KEY_BYTES``.
    is_new : callable
        Whether there is nothing in the folder yet that would have to be sealed.

    Raises
    ------
    ConfigError
        The content is sealed and the key is missing or another one, or it is not sealed and there
        is a key. Nothing is damaged then.
    DiskFull, StorageError
    """
    path = folder / KEY_FILE
    if key is None:
        if path.exists():
            raise ConfigError(f"{folder} is encrypted: open it with its key")
        return None
    master = Sealer(key)
    if not path.exists():
        if not is_new():
            raise ConfigError(
                f"{folder} has no {KEY_FILE}: it was made without a key, and what is in it is not "
                "encrypted, or the file was removed, and what is in it is lost"
            )
        _write(path, _wrapped(master, secrets.token_bytes(KEY_BYTES)), replace=False)
    return Sealer(_unwrapped(path, master))


def open_root_key(paths: RootPaths, key: bytes | None) -> Sealer | None:
    """Do as ``open_key`` for the root of a session store."""

    def is_new() -> bool:
        return not paths.catalog.exists() and next(paths.data_files(), None) is None

    return open_key(paths.root, key, is_new)


def rotate_key(folder: Path, old: bytes, new: bytes) -> None:
    """Seal the key of a folder with another key of the caller; nothing else is written.

    Who has it open goes on. Whoever has had the old key and a copy of the old file can still
    read: after a theft, import the sessions to a new root.

    Raises
    ------
    ConfigError
        The folder is not sealed, or not with the old key.
    DiskFull, StorageError
        The old key is still the one.
    """
    path, master = folder / KEY_FILE, Sealer(new)
    if not path.exists():
        raise ConfigError(f"{folder} has no {KEY_FILE}, and no key that could be changed")
    _write(path, _wrapped(master, _unwrapped(path, Sealer(old))), replace=True)


def _wrapped(master: Sealer, data_key: bytes) -> bytes:
    sealed = master.seal(_PURPOSE, data_key, _context())
    fields = {
        "version": VERSION,
        "kdf": _KDF,
        "wrapped_key": base64.b64encode(sealed).decode(),
        "key_check": master.derive("check").hex(),
    }
    return json.dumps(fields, indent=1).encode() + b"\n"


def _unwrapped(path: Path, master: Sealer) -> bytes:
    fields = _read(path)
    if fields.get("version") != VERSION or fields.get("kdf") != _KDF:
        raise ConfigError(
            f"{path}: version {fields.get('version')!r}, {fields.get('kdf')!r}; this code reads "
            f"version {VERSION}, {_KDF}"
        )
    if fields.get("key_check") != master.derive("check").hex():
        raise ConfigError(f"{path}: this is not the key that {path.parent} was encrypted with")
    try:
        sealed = base64.b64decode(str(fields.get("wrapped_key")), validate=True)
        return master.open(_PURPOSE, sealed, _context(), str(path))
    except (binascii.Error, CorruptChunk) as error:
        raise ConfigError(f"{path} is damaged; restore it from a copy: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise as_storage_error(error, f"read of {path}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged; restore it from a copy: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is damaged; restore it from a copy: {type(fields).__name__}")
    return fields


def _write(path: Path, content: bytes, *, replace: bool) -> None:
    """Write the file, whole or not at all, and make it survive a power cut.

    Without ``replace``, one that another process has written meanwhile stays.
    """
    draft = path.with_name(f"{path.name}-{secrets.token_hex(8)}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(draft, flags, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(draft, path)
        else:
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        raise as_storage_error(error, f"write of {path}") from error
    finally:
        draft.unlink(missing_ok=True)


def _context() -> bytes:
    return f"version {VERSION}, {_KDF}".encode()
