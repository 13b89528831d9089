"""Session files that are sealed: their header page stays, and what follows it is one blob."""

import struct
from pathlib import Path

import xxhash

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.sealing import Sealer
from offload.types import PAGE_BYTES

MAGIC = b"KVSESSN\0"
VERSION = 1
SEALED_VERSION = 2

_START = struct.Struct("<8sHxxIQ")  # magic, version, bytes of description and tensors, not sealed
_DIGESTS = struct.Struct("<QQ")  # of the blob; the second is zero
_OWN = struct.Struct("<Q")
_OWN_OFFSET = PAGE_BYTES - _OWN.size
_PURPOSE = "session"


def seal_session(packed: bytes, identity: str, sealer: Sealer | None) -> bytes:
    """Return the bytes of a session file, sealed if there is a sealer.

    Parameters
    ----------
    packed : bytes
        What ``SessionFile.pack`` returned.
    identity : str
        Of the session: the file opens under no other name.
    sealer : Sealer or None
    """
    if sealer is None:
        return packed
    _, _, *sizes = _START.unpack_from(packed)
    page = bytearray(PAGE_BYTES)
    _START.pack_into(page, 0, MAGIC, SEALED_VERSION, *sizes)
    blob = sealer.seal(_PURPOSE, packed[PAGE_BYTES:], _context(page, identity))
    _DIGESTS.pack_into(page, _START.size, xxhash.xxh3_64_intdigest(blob), 0)
    _OWN.pack_into(page, _OWN_OFFSET, xxhash.xxh3_64_intdigest(page[:_OWN_OFFSET]))
    return bytes(page) + blob


def open_sealed(content: bytes, path: Path, sealer: Sealer | None) -> bytes:
    """Undo ``seal_session``.

    Parameters
    ----------
    content : bytes
        Of the file.
    path : Path
        Where it was read.
    sealer : Sealer or None

    Returns
    -------
    bytes
        As ``SessionFile.pack`` made them.

    Raises
    ------
    CorruptChunk
        The file is not what was sealed under this name, or is not sealed and should be.
    ConfigError
        It is sealed, and there is no sealer.
    """
    if _version(content, path) != SEALED_VERSION:
        if sealer is not None:
            raise CorruptChunk(f"{path} is not sealed, where every session is")
        return content  # whoever unpacks it says what else it may be
    if sealer is None:
        raise ConfigError(f"{path} is encrypted; it takes the key to read it")
    check_blob(content, path)
    opened = sealer.open(_PURPOSE, content[PAGE_BYTES:], _context(content, path.stem), str(path))
    _, _, *sizes = _START.unpack_from(content)
    if len(opened) != sum(sizes):
        raise CorruptChunk(f"{path} holds {len(opened)} bytes, its header says {sum(sizes)}")
    description, tensors = opened[: sizes[0]], opened[sizes[0] :]
    page = bytearray(PAGE_BYTES)
    _START.pack_into(page, 0, MAGIC, VERSION, *sizes)
    digests = map(xxhash.xxh3_64_intdigest, (description, tensors))
    _DIGESTS.pack_into(page, _START.size, *digests)
    _OWN.pack_into(page, _OWN_OFFSET, xxhash.xxh3_64_intdigest(page[:_OWN_OFFSET]))
    return bytes(page) + opened


def check_blob(content: bytes, path: Path) -> None:
    """Verify the checksums of a file, which takes no key.

    Raises
    ------
    CorruptChunk
        It is damaged. Of one that is not sealed, only the header is looked at.
    """
    if _version(content, path) == SEALED_VERSION:
        stored, _ = _DIGESTS.unpack_from(content, _START.size)
        found = xxhash.xxh3_64_intdigest(content[PAGE_BYTES:])
        if found != stored:
            raise CorruptChunk(f"{path}: checksum of the content is {found:x}, stored {stored:x}")


def _version(content: bytes, path: Path) -> int:
    """Return the version that a sound header page says."""
    if len(content) < PAGE_BYTES:
        raise CorruptChunk(f"{path} ends inside its header, after {len(content)} bytes")
    [own] = _OWN.unpack_from(content, _OWN_OFFSET)
    found = xxhash.xxh3_64_intdigest(content[:_OWN_OFFSET])
    if own != found:
        raise CorruptChunk(f"{path}: header checksum is {found:x}, stored {own:x}")
    return int(_START.unpack_from(content)[1])


def _context(page: bytes | bytearray, identity: str) -> bytes:
    return bytes(page[: _START.size]) + identity.encode()
