"""Single chunks as objects: encoded, written, read back and verified."""

import hashlib
import logging
import struct

import numpy as np
from torch import Tensor

from offload.errors import CorruptChunk
from offload.tiers.remote_block import BlockFormat, decode_frame, pack_block, parse_header
from offload.tiers.remote_bucket import Bucket
from offload.types import ChunkInfo, ChunkLayout

_LOG = logging.getLogger(__name__)
_INFO = struct.Struct("<QQQ")


class RemoteChunks:
    """Chunks of one layout in a bucket, each an object. Any thread may call any method.

    Parameters
    ----------
    bucket : Bucket
    layout : ChunkLayout
    fingerprint : bytes
        Identity of the model, at most 16 bytes.
    compress : bool
    """

    def __init__(
        self, bucket: Bucket, layout: ChunkLayout, fingerprint: bytes, *, compress: bool
    ) -> None:
        self._bucket = bucket
        self._fmt = BlockFormat(fingerprint, 1, layout.chunk_bytes, layout.dtype.itemsize)
        self._compress = compress

    def write(self, name: str, info: ChunkInfo, source: Tensor) -> None:
        """Write a chunk under a name that is nobody else's.

        Parameters
        ----------
        name : str
        info : ChunkInfo
        source : Tensor, uint8 [slot_bytes]
        """
        chunk = source[: self._fmt.chunk_bytes].numpy()
        content = pack_block(self._fmt, _key(info), [chunk], compress=self._compress)
        # If it is there already: an earlier try of this very write, whose answer was lost.
        self._bucket.create(name, content)

    def read(self, name: str, info: ChunkInfo) -> memoryview:
        """Return a chunk, verified.

        What does not verify is read once more, because the damage may have happened on the way.

        Raises
        ------
        CorruptChunk
            The object is damaged, missing, or another chunk's.
        StorageError
        """
        try:
            return self._read(name, info)
        except CorruptChunk as error:
            _LOG.warning("%s; reading it again", error)
            return self._read(name, info)

    def _read(self, name: str, info: ChunkInfo) -> memoryview:
        content, what = self._bucket.get(name), f"{self._bucket.url}/{name}"
        size = self._fmt.header_bytes
        [frame] = parse_header(content[:size], self._fmt, _key(info), what)
        chunk = np.empty(self._fmt.chunk_bytes, np.uint8)
        decode_frame(frame, content[size:], self._fmt, chunk, what)
        return chunk.data


def _key(info: ChunkInfo) -> bytes:
    packed = _INFO.pack(info.chunk_id, info.layer, info.first_token)
    return hashlib.blake2b(packed, digest_size=32).digest()
