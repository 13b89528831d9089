"""Bytes that only who has the key can read or change: AES-256-GCM with a key for each object.

No two objects share an AES key: each has a salt of 256 random bits, from which its key is derived
(HKDF-Expand of RFC 5869, one block of HMAC-SHA256, from a key that is uniform). Inside an object
the nonce is a counter, so none is ever used twice, whatever the number of objects: random 96-bit
nonces under one key would have to stop at 2^32 of them, and a record has dozens. That an object is
written again, under the same name, is safe as well: it gets another salt.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterator
from typing import Any

from offload.errors import ConfigError, CorruptChunk

KEY_BYTES = 32
SALT_BYTES = 32
TAG_BYTES = 16

_NONCE_BYTES = 12
_PIECE_BYTES = 16 << 20
"""A blob is sealed in pieces of so many bytes: the library takes 2 GiB at most in one call."""


class Box:
    """Seals the numbered parts of one object. Any thread.

    Parameters
    ----------
    key : bytes
        Of this object alone.
    """

    __slots__ = ("_aead", "_key")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._aead = aead(key)

    def seal(self, number: int, content: bytes | memoryview, context: bytes) -> bytes:
        """Return a part sealed, and ``TAG_BYTES`` behind it; each number is used once.

        Parameters
        ----------
        number : int
        content : bytes-like
        context : bytes
            What the part belongs to; it opens in no other.
        """
        sealed: bytes = self._aead.encrypt(_nonce(number), content, context)
        return sealed

    def open_in_place(self, number: int, sealed: memoryview, tag: bytes, context: bytes) -> bool:
        """Replace a sealed part by its content; return whether it is what was sealed.

        Where it is not, what is left in the memory means nothing.
        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        mode = modes.GCM(_nonce(number), tag)
        opener = Cipher(algorithms.AES(self._key), mode).decryptor()
        opener.authenticate_additional_data(context)
        opener.update_into(sealed, sealed)
        try:
            opener.finalize()
        except InvalidTag:
            return False
        return True


class Sealer:
    """A key that others are derived from, each for one purpose. Any thread.

    Parameters
    ----------
    key : bytes
        ``KEY_BYTES`` that nobody can guess.

    Raises
    ------
    ConfigError
        The key has another length, or the package `cryptography` is missing.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            what = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
            raise ConfigError(f"an encryption key is {KEY_BYTES} bytes, not {what}")
        aead(key)
        self._key = key

    @classmethod
    def of_this_process(cls) -> "Sealer":
        """Return one with a new random key that is written nowhere."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def derive(self, purpose: str, content: bytes = b"") -> bytes:
        """Return ``KEY_BYTES`` that only who has the key can compute.

        Parameters
        ----------
        purpose : str
            Of a few fixed words; results of two purposes have nothing in common.
        content : bytes
        """
        label = f"kv-offload {purpose}".encode()
        return hmac.digest(self._key, label + b"\0" + content + b"\1", hashlib.sha256)

    def box(self, purpose: str, salt: bytes) -> Box:
        """Return what seals and opens the object with this salt."""
        return Box(self.derive(f"{purpose} key", salt))

    def seal(self, purpose: str, content: bytes, context: bytes) -> bytes:
        """Return a salt and the content, sealed.

        Parameters
        ----------
        purpose : str
        content : bytes
        context : bytes
            What the content belongs to; it opens in no other.
        """
        salt = secrets.token_bytes(SALT_BYTES)
        box, context = self.box(purpose, salt), _with_size(context, len(content))
        view = memoryview(content)
        pieces = (
            box.seal(number, view[start:stop], context)
            for number, start, stop in _pieces(len(content), 0)
        )
        return b"".join((salt, *pieces))

    def open(self, purpose: str, sealed: bytes, context: bytes, what: str) -> bytes:
        """Undo ``seal``.

        Parameters
        ----------
        purpose, sealed, context
        what : str
            Names it in an error.

        Raises
        ------
        CorruptChunk
            It is not what was sealed, or not with this key, purpose and context.
        """
        content = memoryview(bytearray(sealed))
        num_pieces = -(-(len(sealed) - SALT_BYTES) // (_PIECE_BYTES + TAG_BYTES))
        size = len(sealed) - SALT_BYTES - num_pieces * TAG_BYTES
        if num_pieces < 1 or size < 0:
            raise CorruptChunk(f"{what}: {len(sealed)} bytes are nothing sealed")
        box, context = self.box(purpose, bytes(content[:SALT_BYTES])), _with_size(context, size)
        opened = []
        for number, start, stop in _pieces(size, TAG_BYTES):
            piece = content[SALT_BYTES + start : SALT_BYTES + stop]
            own, tag = piece[:-TAG_BYTES], bytes(piece[-TAG_BYTES:])
            if not box.open_in_place(number, own, tag, context):
                raise CorruptChunk(f"{what}: piece {number} of {num_pieces} is not what was sealed")
            opened.append(own)
        return b"".join(opened)


def aead(key: bytes) -> Any:
    """Return AES-256-GCM with a key.

    Raises
    ------
    ConfigError
        The package `cryptography` is missing.
    """
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise ConfigError(
            "encryption needs cryptography: pip install 'kv-offload[encryption]'"
        ) from error
    return AESGCM(key)


def _pieces(size: int, extra: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and end of the pieces of a blob, ``extra`` bytes longer; one at least."""
    step = _PIECE_BYTES + extra
    for number in range(max(1, -(-size // _PIECE_BYTES))):
        own = min(_PIECE_BYTES, size - number * _PIECE_BYTES)
        yield number, number * step, number * step + own + extra


def _with_size(context: bytes, size: int) -> bytes:
    # So that a blob cannot be cut off between two pieces.
    return context + size.to_bytes(8, "little")


def _nonce(number: int) -> bytes:
    return number.to_bytes(_NONCE_BYTES, "little")
