"""The archive of a session, ``.kv.tar.zst``: which members, in which order, of which sizes.

A tar (ustar) inside one zstd frame::

    manifest.json           one page
    session.kvsession       the session's file
    records/00000000.raw    a header page and a payload; ``.planes`` if the payload is shuffled
    ...

Records are those of layer 0, then of layer 1, and so on, each in the order in which the rows name
their blocks first. Everything but the payloads and one word in their names is known beforehand, so
a reader compares tar headers, and interprets none.
"""

import json
import tarfile
from dataclasses import asdict, dataclass
from typing import Any

from offload.errors import ConfigError, CorruptChunk
from offload.sessions.session_file import BlockRef, SessionFile
from offload.types import PAGE_BYTES, round_up

SUFFIX = ".kv.tar.zst"
MANIFEST, SESSION = "manifest.json", "session.kvsession"
TAR_BLOCK_BYTES = 512
END = bytes(2 * TAR_BLOCK_BYTES)
"""Ends a tar."""

_FORMAT = "kv-offload session"
VERSION = 1
_MAX_COUNT = 1 << 50
_SIZE, _TYPE = slice(124, 135), slice(156, 157)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive holds.

    Attributes
    ----------
    session_bytes : int
        Of the session's file.
    num_layers, num_blocks : int
        There is a record for every layer of every block.
    payload_bytes : int
        Of one record.
    """

    session_bytes: int
    num_layers: int
    num_blocks: int
    payload_bytes: int

    @property
    def num_records(self) -> int:
        """Of all layers."""
        return self.num_layers * self.num_blocks

    @property
    def record_bytes(self) -> int:
        """Of one record, header page and payload."""
        return PAGE_BYTES + self.payload_bytes

    @property
    def total_bytes(self) -> int:
        """Of the tar, before compression."""
        sizes = member_bytes(PAGE_BYTES) + member_bytes(self.session_bytes) + len(END)
        return sizes + self.num_records * member_bytes(self.record_bytes)

    def pack(self) -> bytes:
        """Return the content of the manifest, one page of JSON and blanks."""
        numbers = {**asdict(self), "total_bytes": self.total_bytes}
        text = json.dumps({"format": _FORMAT, "version": VERSION, **numbers}, indent=1)
        return text.encode().ljust(PAGE_BYTES - 1) + b"\n"


def parse_manifest(content: bytes, what: str) -> Manifest:
    """Read a page that ``Manifest.pack`` made.

    Parameters
    ----------
    content : bytes
    what : str
        Names the archive in an error.

    Raises
    ------
    CorruptChunk
        It is no manifest, or contradicts itself.
    ConfigError
        Another version of this package has written it.
    """
    try:
        found: Any = json.loads(content)
        is_ours = found["format"] == _FORMAT
        version = found["version"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CorruptChunk(f"{what}: {MANIFEST} is no manifest: {error!r}") from error
    if not is_ours:
        raise CorruptChunk(f"{what}: {MANIFEST} is that of {found['format']!r}, not {_FORMAT!r}")
    if type(version) is not int or version != VERSION:
        raise ConfigError(
            f"{what} was written by another version of this package: version {version!r}, this "
            f"code reads {VERSION}"
        )
    names = ("session_bytes", "num_layers", "num_blocks", "payload_bytes")
    values = [found.get(name) for name in names]
    if not all(type(value) is int and 0 <= value < _MAX_COUNT for value in values):
        raise CorruptChunk(f"{what}: {MANIFEST} has impossible numbers: {found}")
    manifest = Manifest(*values)
    if manifest.pack() != content:
        raise CorruptChunk(
            f"{what}: {MANIFEST} says {found}, which makes {manifest.total_bytes} bytes in all"
        )
    return manifest


def member_bytes(num_bytes: int) -> int:
    """Return what a member of this size takes up in a tar."""
    return TAR_BLOCK_BYTES + round_up(num_bytes, TAR_BLOCK_BYTES)


def member_header(name: str, num_bytes: int) -> bytes:
    """Return the tar header of a private regular file, without date and owner.

    Raises
    ------
    ConfigError
        A tar of this kind has no members so large.
    """
    member = tarfile.TarInfo(name)
    member.size, member.mode = num_bytes, 0o600
    try:
        return member.tobuf(tarfile.USTAR_FORMAT)
    except ValueError as error:
        raise ConfigError(f"{name} of {num_bytes} bytes is too large for an archive") from error


def describe_header(header: bytes | bytearray) -> str:
    """Say what a tar header is about, for an error; it may be anything."""
    header = bytes(header)
    name, size, kind = header[:100].rstrip(b"\0"), header[_SIZE], header[_TYPE]
    return f"{name!r} of type {kind!r} and size {size!r} (octal)"


def record_names(number: int) -> tuple[str, str]:
    """Return the names of a record, by whether it is shuffled: no, yes."""
    return f"records/{number:08d}.raw", f"records/{number:08d}.planes"


def distinct_blocks(file: SessionFile) -> dict[BlockRef, int]:
    """Return every block of a session once, and its position, in the order of an archive.

    Raises
    ------
    CorruptChunk
        A block is named at two positions.
    """
    found: dict[BlockRef, int] = {}
    for row in file.rows:
        for position, ref in enumerate(row):
            if found.setdefault(ref, position) != position:
                raise CorruptChunk(
                    f"session {file.name!r} has one block at positions {found[ref]} and {position}"
                )
    return found
