"""What an object of chunks is: a header, and a frame for each chunk. Pure, no I/O.

The header says where each frame lies and what it is to contain, so that one can be read, verified
and decoded without the others. Numbers are little endian; ``docs/remote.md`` has the offsets.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.codec import LEVEL, gains, shuffle, unshuffle

MAGIC = b"KVREMOTE"
VERSION = 1
KEY_BYTES = 32
FINGERPRINT_BYTES = 16
MAX_FRAMES = 1 << 16

_RAW, _ZSTD, _PLANES = 0, 1, 2
"""How a frame is stored: as it is, compressed, compressed byte plane by byte plane."""

_FIELDS = struct.Struct("<8sHBxIQ16s32s")  # magic, version, element bytes, frames, chunk bytes, ids
_FRAME = struct.Struct("<B7xQQQ")  # kind, stored bytes, checksum as stored, checksum of the chunk
_CHECKSUM = struct.Struct("<Q")
_MAX_SHARE = 0.95
"""Compressed frames of more than this are stored as they are: decoding takes time."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Frame:
    """Where one chunk lies in an object, and how.

    Attributes
    ----------
    kind : int
    start, num_bytes : int
        In the object.
    stored, chunk : int
        The xxh3_64 of the frame, and of what it decodes to.
    """

    kind: int
    start: int
    num_bytes: int
    stored: int
    chunk: int


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """What a reader knows before it reads.

    Attributes
    ----------
    fingerprint : bytes
        Of the model, at most 16 bytes.
    num_frames : int
    chunk_bytes : int
        Of each chunk, decoded.
    element_bytes : int
        Of one number.
    """

    fingerprint: bytes
    num_frames: int
    chunk_bytes: int
    element_bytes: int

    def __post_init__(self) -> None:
        if len(self.fingerprint) > FINGERPRINT_BYTES:
            raise ConfigError(
                f"a model fingerprint has at most {FINGERPRINT_BYTES} bytes, "
                f"not {len(self.fingerprint)}"
            )
        if not 0 < self.num_frames <= MAX_FRAMES:
            raise ConfigError(f"{self.num_frames} chunks in an object; at most {MAX_FRAMES}")

    @property
    def header_bytes(self) -> int:
        """Bytes before the first frame."""
        return _FIELDS.size + self.num_frames * _FRAME.size + _CHECKSUM.size

    @property
    def most_bytes(self) -> int:
        """Bytes of the largest object of this format."""
        return self.header_bytes + self.num_frames * self.chunk_bytes


def pack_block(fmt: BlockFormat, key: bytes, chunks: Sequence[Bytes], *, compress: bool) -> bytes:
    """Return the bytes of an object.

    Parameters
    ----------
    fmt : BlockFormat
    key : bytes
        ``KEY_BYTES`` that name the content.
    chunks : sequence of ndarray, uint8 [chunk_bytes]
        As many as there are frames.
    compress : bool
        Without loss, each chunk by itself, where that saves anything.
    """
    header = bytearray(
        _FIELDS.pack(
            MAGIC,
            VERSION,
            fmt.element_bytes,
            fmt.num_frames,
            fmt.chunk_bytes,
            fmt.fingerprint.ljust(FINGERPRINT_BYTES, b"\0"),
            key,
        )
    )
    frames = []
    for chunk in chunks:
        assert len(chunk) == fmt.chunk_bytes
        kind, content = _encode(chunk, fmt.element_bytes) if compress else (_RAW, chunk.tobytes())
        digests = xxhash.xxh3_64_intdigest(content), xxhash.xxh3_64_intdigest(chunk.data)
        header += _FRAME.pack(kind, len(content), *digests)
        frames.append(content)
    assert len(frames) == fmt.num_frames
    return b"".join([header, _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header)), *frames])


def parse_header(header: bytes, fmt: BlockFormat, key: bytes, what: str) -> tuple[Frame, ...]:
    """Return where the chunks of an object lie.

    Parameters
    ----------
    header : bytes
        The first ``header_bytes`` of the object.
    fmt : BlockFormat
    key : bytes
    what : str
        Names the object in an error.

    Raises
    ------
    CorruptChunk
        The header is damaged, or is that of other content.
    """
    if len(header) != fmt.header_bytes:
        raise CorruptChunk(f"{what}: a header of {len(header)} bytes, not {fmt.header_bytes}")
    [stored] = _CHECKSUM.unpack_from(header, len(header) - _CHECKSUM.size)
    found = xxhash.xxh3_64_intdigest(header[: -_CHECKSUM.size])
    if found != stored:
        raise CorruptChunk(f"{what}: header checksum is {found:016x}, stored {stored:016x}")
    fields = _FIELDS.unpack_from(header)
    fingerprint = fmt.fingerprint.ljust(FINGERPRINT_BYTES, b"\0")
    expected = (MAGIC, VERSION, fmt.element_bytes, fmt.num_frames, fmt.chunk_bytes, fingerprint)
    if fields != (*expected, key):
        names = ("magic", "version", "element bytes", "frames", "chunk bytes", "model", "key")
        triples = zip(names, (*expected, key), fields, strict=True)
        name, want, got = next(each for each in triples if each[1] != each[2])
        raise CorruptChunk(f"{what}: {name} should be {want!r}, the object has {got!r}")
    return tuple(_frames(header, fmt, what))


def decode_frame(frame: Frame, content: bytes, fmt: BlockFormat, out: Bytes, what: str) -> None:
    """Verify and decode one chunk.

    Parameters
    ----------
    frame : Frame
    content : bytes
        Those of the frame.
    fmt : BlockFormat
    out : ndarray, uint8 [chunk_bytes]
    what : str
        Names the chunk in an error.

    Raises
    ------
    CorruptChunk
        It is not what was written; ``out`` then holds nothing of use.
    """
    found = xxhash.xxh3_64_intdigest(content)
    if len(content) != frame.num_bytes or found != frame.stored:
        raise CorruptChunk(
            f"{what}: {len(content)} bytes with checksum {found:016x}, the header says "
            f"{frame.num_bytes} with {frame.stored:016x}"
        )
    if frame.kind == _RAW:
        out[:] = np.frombuffer(content, np.uint8)
    else:
        plain = _decompress(content, fmt.chunk_bytes, what)
        if frame.kind == _PLANES:
            unshuffle(plain, fmt.element_bytes, out)
        else:
            out[:] = plain
    found = xxhash.xxh3_64_intdigest(out.data)
    if found != frame.chunk:
        raise CorruptChunk(
            f"{what}: decodes to checksum {found:016x}, the header says {frame.chunk:016x}"
        )


def _frames(header: bytes, fmt: BlockFormat, what: str) -> list[Frame]:
    frames, start = [], fmt.header_bytes
    for number in range(fmt.num_frames):
        offset = _FIELDS.size + number * _FRAME.size
        kind, num_bytes, stored, chunk = _FRAME.unpack_from(header, offset)
        is_whole = kind != _RAW or num_bytes == fmt.chunk_bytes
        if kind > _PLANES or not 0 < num_bytes <= fmt.chunk_bytes or not is_whole:
            raise CorruptChunk(f"{what}: frame {number} of kind {kind} has {num_bytes} bytes")
        frames.append(Frame(kind, start, num_bytes, stored, chunk))
        start += num_bytes
    return frames


def _encode(chunk: Bytes, element_bytes: int) -> tuple[int, bytes]:
    kind, source = _ZSTD, chunk
    if gains(chunk, element_bytes):
        kind, source = _PLANES, np.empty(len(chunk), np.uint8)
        shuffle(chunk, element_bytes, source)
    content = zstandard.ZstdCompressor(level=LEVEL).compress(source.data)
    if len(content) > _MAX_SHARE * len(chunk):
        return _RAW, chunk.tobytes()
    return kind, content


def _decompress(content: bytes, num_bytes: int, what: str) -> Bytes:
    try:
        # Checked first: the decompressor makes room for whatever the frame says.
        if zstandard.frame_content_size(content) != num_bytes:
            raise CorruptChunk(f"{what}: its frame does not decompress to {num_bytes} bytes")
        plain = zstandard.ZstdDecompressor().decompress(content, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptChunk(f"{what}: {len(content)} bytes are no zstd frame: {error}") from error
    return np.frombuffer(plain, np.uint8)
