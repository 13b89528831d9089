"""Files that hold an encryption key: 32 bytes, as they are or as text, for their owner alone."""

import base64
import binascii
import os
import secrets
from pathlib import Path

from offload.errors import ConfigError
from offload.tiers.sealing import KEY_BYTES, Sealer

TENANTS = "tenants"
"""Below the data path of the daemon: a folder for each, with the root of its sessions."""

_OPEN_MODE = 0o077
_MOST_BYTES = 1024


def read_key_file(path: Path) -> bytes:
    """Return the key of a file.

    Parameters
    ----------
    path : Path
        ``KEY_BYTES`` as they are, or in hexadecimal, or in base64.

    Raises
    ------
    ConfigError
        The file cannot be read, others may read it, or it holds no key.
    """
    try:
        with path.expanduser().open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read the key of {path}: {error.strerror or error}") from error
    if mode & _OPEN_MODE:
        raise ConfigError(
            f"{path} has mode {mode & 0o777:o}: others may read or change it; chmod 600 {path}"
        )
    if len(content) == KEY_BYTES:
        return content
    key = _decoded(content.strip())
    if key is None or len(key) != KEY_BYTES:
        raise ConfigError(
            f"{path} has {len(content)} bytes, which are not {KEY_BYTES} bytes, in hexadecimal, in "
            "base64 or as they are; `offload config encryption-key FILE` makes a key"
        )
    return key


def make_key_file(path: Path) -> None:
    """Write a new random key, in hexadecimal, to a new file.

    Raises
    ------
    ConfigError
        The file is there, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(path.expanduser(), flags, 0o600), "w") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"cannot make {path}: {error.strerror or error}") from error


def tenant_key(sealer: Sealer, folder: Path) -> bytes:
    """Return the key of a tenant of the daemon, whose folder below the data path this is."""
    return sealer.derive("tenant", folder.name.encode())


def _decoded(text: bytes) -> bytes | None:
    try:
        if len(text) == 2 * KEY_BYTES:
            return bytes.fromhex(text.decode())
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
