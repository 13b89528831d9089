"""Names for chunks by what they contain: a chained hash of the tokens up to their end."""

import hashlib
import secrets

import numpy as np
from torch import Tensor

KEY_BYTES = 32


def chain_keys(first_key: bytes, token_ids: Tensor, chunk_tokens: int) -> list[bytes]:
    """Return the key of every full chunk of a row.

    The keys and values of a chunk depend on all tokens before it, so its key does too: BLAKE2b over
    the key of the chunk before and the chunk's own token ids (64 bit, little endian). The first is
    chained to the namespace's digest, or, in a store that is sealed, to a secret of it.

    Parameters
    ----------
    first_key : bytes
        See ``Root.first_key``.
    token_ids : Tensor, shape (num_tokens,), integers
    chunk_tokens : int

    Returns
    -------
    list of bytes
        ``num_tokens // chunk_tokens`` keys of ``KEY_BYTES``.
    """
    ids = token_ids.cpu().numpy().astype(np.dtype("<i8"))
    keys, previous = [], first_key
    for start in range(0, len(ids) - chunk_tokens + 1, chunk_tokens):
        part = ids[start : start + chunk_tokens].tobytes()
        previous = hashlib.blake2b(previous + part, digest_size=KEY_BYTES).digest()
        keys.append(previous)
    return keys


def random_key() -> bytes:
    """Return a key for a chunk whose tokens nobody knows; nothing can look it up."""
    return secrets.token_bytes(KEY_BYTES)


def foreign_key() -> bytes:
    """Return a key for a chunk that a stranger made; nothing can look it up, whatever its tokens.

    It tells wherever it is copied: its second half follows from the first, which is random.
    """
    start = secrets.token_bytes(KEY_BYTES // 2)
    return start + _foreign_end(start)


def is_foreign(key: bytes) -> bool:
    """Whether ``foreign_key`` has made a key."""
    return key[KEY_BYTES // 2 :] == _foreign_end(key[: KEY_BYTES // 2])


def record_id(key: bytes) -> int:
    """Return the part of a key that the record itself carries as its chunk id."""
    return int.from_bytes(key[:8], "little")


def _foreign_end(start: bytes) -> bytes:
    return hashlib.blake2b(start, digest_size=KEY_BYTES // 2, person=b"foreign").digest()
