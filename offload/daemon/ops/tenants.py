"""Who may use the daemon: keys, kept as digests, and the tenants that they stand for."""

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from offload.errors import ConfigError

LOCAL: Final = "local"
"""The tenant of everybody, where there are no keys."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/[A-Za-z0-9][A-Za-z0-9._-]{0,63})?")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_ADMIN: Final = "admin"
_OPEN_MODE: Final = 0o027


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody whose sessions nobody else sees.

    Attributes
    ----------
    name : str
    is_admin : bool
        May see the numbers of all tenants: the status page and, with keys, the metrics.
    key_name : str
        Which of the tenant's keys was shown.
    """

    name: str
    is_admin: bool = False
    key_name: str = ""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is kept.

    Attributes
    ----------
    name : str
        ``tenant``, or ``tenant/which`` where a tenant has several.
    digest : bytes
        SHA-256 of the key, 32 bytes.
    is_admin : bool
    """

    name: str
    digest: bytes
    is_admin: bool = False

    @property
    def tenant(self) -> Tenant:
        """Return whose key this is."""
        return Tenant(self.name.partition("/")[0], self.is_admin, self.name)


def digest_of(key: str) -> bytes:
    """Return what is kept of a key. Keys are long and random, so that a plain hash will do."""
    return hashlib.sha256(key.encode()).digest()


def new_key() -> str:
    """Return a random key of 256 bits."""
    return f"sk-{secrets.token_urlsafe(32)}"


def key_line(name: str, key: str, *, is_admin: bool) -> str:
    """Return the line of a key file, or raise ConfigError if the name will not do."""
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{name!r} is no name of a key: letters, digits, . _ -, and one / between"
        )
    return f"{name}:{digest_of(key).hex()}{':' + _ADMIN if is_admin else ''}"


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read a key file: ``name:sha256`` or ``name:sha256:admin`` a line, ``#`` for comments.

    Raises
    ------
    ConfigError
        The file cannot be read, others than its owner and group can read or change it, a line is
        none, a name or a digest appears twice, or there is no key at all.
    """
    try:
        mode = path.stat().st_mode
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the keys of {path}: {error}") from error
    if mode & _OPEN_MODE:
        raise ConfigError(
            f"{path} has mode {mode & 0o777:o}: others may read or change it; chmod 600 {path}"
        )
    entries = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    keys = tuple(
        _read_line(line, f"{path}:{number}")
        for number, line in entries
        if line and not line.startswith("#")
    )
    if not keys:
        raise ConfigError(f"{path} has no keys; `offload config key NAME` makes one")
    for found in ([key.name for key in keys], [key.digest for key in keys]):
        if len(set(found)) < len(found):
            raise ConfigError(f"{path}: a name or a key appears twice in its {len(keys)} keys")
    return keys


def append_key(path: Path, line: str) -> None:
    """Add a line to a key file, which is made, for its owner alone, if it is missing.

    Raises
    ------
    ConfigError
        The file cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _read_line(line: str, where: str) -> ApiKey:
    name, _, rest = line.partition(":")
    digest, _, scope = rest.partition(":")
    is_good = _NAME.fullmatch(name) and _DIGEST.fullmatch(digest) and scope in ("", _ADMIN)
    if not is_good:
        # Not the line itself: it may be a key that somebody did not hash.
        raise ConfigError(f"{where} is not name:sha256 or name:sha256:admin")
    return ApiKey(name, bytes.fromhex(digest), scope == _ADMIN)
