"""What a store of blocks belongs to: nothing of another model or layout is ever found in it."""

import hashlib
import json
from dataclasses import asdict, dataclass

from offload.tiers.record import FINGERPRINT_BYTES
from offload.types import ChunkInfo

_KEY_BYTES = 20
"""What the header of a record has room for: chunk id, first token and layer."""

Key = bytes
"""The BLAKE2b of what an engine calls a block, ``_KEY_BYTES`` long."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that two engines must agree on to read each other's blocks.

    Attributes
    ----------
    engine : str
        Whose keys and layout these are.
    model : str
        Name of the model, or a digest of its configuration.
    dtype : str
        Of keys and values.
    row_bytes : int
        Bytes of one block.
    block_tokens : int
    tp_rank, tp_size : int
        Tensor parallelism: which part of the heads a block holds.
    details : str
        What else matters to the engine, in a form that is the same in every process.
    """

    engine: str
    model: str
    dtype: str
    row_bytes: int
    block_tokens: int
    tp_rank: int = 0
    tp_size: int = 1
    details: str = ""

    @property
    def fingerprint(self) -> bytes:
        """Sixteen bytes that stand for all fields, in every header and as name of the folder."""
        return hashlib.blake2b(self.describe().encode(), digest_size=FINGERPRINT_BYTES).digest()

    def describe(self) -> str:
        """Return the fields as JSON, always in the same order."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)


def key_of(name: bytes) -> Key:
    """Return the key of what an engine calls a block."""
    return hashlib.blake2b(name, digest_size=_KEY_BYTES).digest()


def info_of(key: Key) -> ChunkInfo:
    """Return what the header of a block's record says, which is its key."""
    number = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little")
    return ChunkInfo(number[0], int.from_bytes(key[16:], "little"), number[1])


def key_in(info: ChunkInfo) -> Key:
    """Return the key that a header says."""
    words = (info.chunk_id, 8), (info.first_token, 8), (info.layer, 4)
    return b"".join(number.to_bytes(size, "little") for number, size in words)
