"""What an object store knows about one session: a manifest, of which there is one version a time.

Every change is a new object with the next number, created on the condition that there is none: of
two writers that go on from the same version one fails, on every kind of store. The newest counts.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from typing import Any

import xxhash

from offload.errors import ConfigError, CorruptChunk

SESSIONS, BLOCKS, CONDEMNED = "sessions", "blocks", "condemned"
"""Prefixes of what belongs to sessions, of chunks, and of lists of what is to go."""

FORMAT = "kv-offload remote session"
VERSION = 2
"""1 had no notes, and no nonces of earlier versions."""

_CHECKSUM_CHARS = 16


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version of what is known about a session.

    Attributes
    ----------
    name : str
        Of the session.
    number : int
        Of the version, from 1.
    epoch : int
        Grows whenever the session gets another owner, or one that had let it go.
    owner : str
    lease_until : float
        When others may take the session; seconds since 1970, by the owner's clock.
    is_deleted : bool
    expires_at : float or None
    file : str
        Name of the object with the session's file; empty as long as nothing is published.
    file_bytes : int
    namespace : str
        Digest, in hexadecimal.
    num_tokens, num_layers, chunk_bytes : int
    blocks : tuple of str
        Names of the objects with the chunks, in the order of ``distinct_blocks``.
    nonce : str
        Tells an own version from another's of the same number.
    previous : str
        The nonce of the version before.
    notes : mapping
        What the publisher wants whoever fetches it to know; as JSON has it.
    """

    name: str
    number: int
    epoch: int
    owner: str
    lease_until: float = 0.0
    is_deleted: bool = False
    expires_at: float | None = None
    file: str = ""
    file_bytes: int = 0
    namespace: str = ""
    num_tokens: int = 0
    num_layers: int = 0
    chunk_bytes: int = 0
    blocks: tuple[str, ...] = ()
    nonce: str = ""
    previous: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def object_name(self) -> str:
        """Where this version lies."""
        return f"{folder_of(self.name)}/{self.number:012d}.json"

    def is_live(self, now_s: float) -> bool:
        """Whether there is a session to open."""
        has_expired = self.expires_at is not None and self.expires_at <= now_s
        return bool(self.file) and not self.is_deleted and not has_expired

    def pack(self) -> bytes:
        """Return the content of the object: a checksum and a line of JSON."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, sort_keys=True)
        return f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}\n".encode()


_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys((each.name for each in fields(Manifest) if each.type is int), int),
    **dict.fromkeys(("name", "owner", "file", "namespace", "nonce", "previous"), str),
    "lease_until": (int, float),
    "is_deleted": bool,
    "expires_at": (int, float, type(None)),
    "blocks": list,
    "notes": dict,
}


def parse_manifest(content: bytes, what: str) -> Manifest:
    """Read what ``Manifest.pack`` returned.

    Parameters
    ----------
    content : bytes
    what : str
        Names the object in an error.

    Raises
    ------
    CorruptChunk
        It is damaged, or no manifest.
    ConfigError
        A newer version of this package has written it.
    """
    text = content[_CHECKSUM_CHARS + 1 :].rstrip(b"\n")
    found = xxhash.xxh3_64_hexdigest(text)
    if content[:_CHECKSUM_CHARS] != found.encode():
        raise CorruptChunk(f"{what}: checksum is {found}, stored {content[:_CHECKSUM_CHARS]!r}")
    try:
        parts: dict[str, Any] = json.loads(text)
        kind, version = parts.pop("format"), parts.pop("version")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptChunk(f"{what} is no manifest: {error!r}") from error
    if kind == FORMAT and isinstance(version, int) and version > VERSION:
        raise ConfigError(
            f"{what} was written by a newer version of this package: version {version}, this code "
            f"reads {VERSION}"
        )
    if version == 1:
        parts = {"notes": {}, "previous": "", **parts}
    wrong = [name for name, kind in _TYPES.items() if not isinstance(parts.get(name), kind)]
    if kind != FORMAT or wrong or set(parts) != set(_TYPES):
        raise CorruptChunk(f"{what} is no manifest: {kind!r}, wrong fields {wrong}")
    if not all(isinstance(block, str) for block in parts["blocks"]):
        raise CorruptChunk(f"{what}: a block's name is no text")
    return Manifest(**{**parts, "blocks": tuple(parts["blocks"])})


def folder_of(name: str) -> str:
    """Return the prefix of all that belongs to one session only; names may hold any character."""
    return f"{SESSIONS}/{blake2b(name.encode(), digest_size=16).hexdigest()}"


def block_name(namespace: bytes, key: bytes, generation: str = "0") -> str:
    """Return the name of the object with the chunks of one key."""
    return f"{BLOCKS}/{namespace[:16].hex()}/{key.hex()}-{generation}"
