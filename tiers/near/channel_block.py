"""A block of the channel-major copy of K, and the header of its file. Pure, no I/O.

The copy only steers which tokens are read exactly, and can be made again from the records.
``docs/file-format.md`` has the offsets.
"""

import re
import struct
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.record import RecordFormat
from offload.types import ChunkLayout, round_up

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Codes = NDArray[np.int8]
Hashes = NDArray[np.uint64]

Lane = tuple[int, int]
"""Layer and row of the batch, or -1: what is read together. Nothing depends on it but speed."""

MAGIC = b"KVCHANNL"
FORMAT_VERSION = 1

_FIELDS = struct.Struct("<8sHBxIIIIiiIQ32s")
_CHECKSUM = struct.Struct("<Q")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,32}")


class BadBlocks(CorruptChunk):
    """Files of blocks are not what was written, or cannot be read; ``numbers`` names the blocks."""

    def __init__(self, message: str, numbers: list[int]) -> None:
        super().__init__(message)
        self.numbers = numbers


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Keys of some chunks, in int8, channel-major: ``[num_kv_heads, key_dim, num_tokens]``.

    A run is the codes of one head and channel. The codes lie in a file, or in memory.

    Attributes
    ----------
    number : int
        Names the block in its store; never reused.
    lane : tuple of int
    slots : tuple of int
        The chunk of each column.
    scales : ndarray, float32 [num_kv_heads, key_dim]
        Times a code, they give the key.
    value_means : ndarray, float32 [num_kv_heads, value_dim]
        Mean of V over all tokens of the block.
    start : int
        Address of the first code, or its offset in the file.
    checksums : ndarray, uint64 [num_kv_heads, key_dim]
        The xxh3_64 of each run of a block in a file; of one in memory there are none.
    codes : ndarray, int8 [num_kv_heads, key_dim, num_tokens], or None
        Of a block in memory.
    """

    number: int
    lane: Lane
    slots: tuple[int, ...]
    scales: Floats
    value_means: Floats
    start: int
    checksums: Hashes
    codes: Codes | None = None


@dataclass(frozen=True)
class BlockFormat:
    """What all blocks of one store have in common.

    Parameters
    ----------
    layout : ChunkLayout
        Of the chunks; its heads are those that the store holds.
    token : str
        Whose blocks they are: 1 to 32 letters, digits, ``-`` and ``_``.

    Raises
    ------
    ConfigError
        The token is something else, or chunks of the dtype cannot be stored.
    """

    layout: ChunkLayout
    token: str
    dtype_code: int = field(init=False)

    def __post_init__(self) -> None:
        if not _TOKEN.fullmatch(self.token):
            raise ConfigError(
                f"a token is 1 to 32 letters, digits, '-' and '_', not {self.token!r}"
            )
        object.__setattr__(self, "dtype_code", RecordFormat(self.layout).dtype_code)

    @property
    def num_runs(self) -> int:
        """Runs of a block: one for each head and channel."""
        return self.layout.num_kv_heads * self.layout.key_dim

    def header_bytes(self, num_chunks: int) -> int:
        """Return the bytes before the codes, whole pages."""
        sizes = self._array_bytes(num_chunks)
        return round_up(_FIELDS.size + sum(sizes) + _CHECKSUM.size)

    def file_bytes(self, num_chunks: int) -> int:
        """Return the bytes of a file, whole pages."""
        payload_bytes = self.num_runs * num_chunks * self.layout.chunk_tokens
        return self.header_bytes(num_chunks) + round_up(payload_bytes)

    def pack(self, block: Block) -> bytes:
        """Return the header of a block's file."""
        fields = _FIELDS.pack(
            MAGIC,
            FORMAT_VERSION,
            self.dtype_code,
            *self._shape(),
            *block.lane,
            len(block.slots),
            block.number,
            self.token.encode(),
        )
        arrays = (np.array(block.slots, "<i8"), block.value_means, block.scales, block.checksums)
        page = fields + b"".join(array.tobytes() for array in arrays)
        page = page.ljust(self.header_bytes(len(block.slots)) - _CHECKSUM.size, b"\0")
        return page + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(page))

    def num_chunks(self, page: bytes, file_bytes: int, file: str) -> int:
        """Return how many chunks the first page of a file says that it holds.

        Raises
        ------
        CorruptChunk
            It is no block of this store, or a file of that many has not ``file_bytes``.
        """
        found = _FIELDS.unpack_from(page.ljust(_FIELDS.size, b"\0"))
        expected = (MAGIC, FORMAT_VERSION, self.dtype_code, *self._shape())
        token = found[-1].rstrip(b"\0").decode("ascii", "replace")
        if found[:7] != expected or token != self.token:
            raise CorruptChunk(
                f"{file}: magic, version, dtype, heads, tokens and widths should be {expected} of "
                f"token {self.token!r}, the file has {found[:7]} of {token!r}"
            )
        num_chunks: int = found[9]
        if not num_chunks or self.file_bytes(num_chunks) != file_bytes:
            raise CorruptChunk(f"{file}: {num_chunks} chunks in {file_bytes} bytes")
        return num_chunks

    def parse(self, header: bytes, number: int, file: str) -> Block:
        """Return what a header, whose first page has passed ``num_chunks``, says of its block.

        Raises
        ------
        CorruptChunk
            The header is not what was written, or that of another block.
        """
        own = xxhash.xxh3_64_intdigest(header[: -_CHECKSUM.size])
        [stored] = _CHECKSUM.unpack_from(header, len(header) - _CHECKSUM.size)
        if own != stored:
            raise CorruptChunk(
                f"{file}: header checksum is {own:016x}, the file says {stored:016x}"
            )
        layer, row, num_chunks, found = _FIELDS.unpack_from(header)[7:11]
        if found != number:
            raise CorruptChunk(f"{file}: should be block {number}, the header says {found}")
        arrays, start = [], _FIELDS.size
        for num_bytes in self._array_bytes(num_chunks):
            arrays.append(header[start : start + num_bytes])
            start += num_bytes
        slots, means, scales, checksums = arrays
        heads = self.layout.num_kv_heads
        return Block(
            number,
            (layer, row),
            tuple(np.frombuffer(slots, "<i8").tolist()),
            np.frombuffer(scales, "<f4").reshape(heads, -1),
            np.frombuffer(means, "<f4").reshape(heads, -1),
            len(header),
            np.frombuffer(checksums, "<u8").reshape(heads, -1),
        )

    def _shape(self) -> tuple[int, int, int, int]:
        layout = self.layout
        return layout.num_kv_heads, layout.chunk_tokens, layout.key_dim, layout.value_dim

    def _array_bytes(self, num_chunks: int) -> tuple[int, int, int, int]:
        """Return the bytes of slots, means of V, scales and checksums."""
        num_means = self.layout.num_kv_heads * self.layout.value_dim
        return 8 * num_chunks, 4 * num_means, 4 * self.num_runs, 8 * self.num_runs
