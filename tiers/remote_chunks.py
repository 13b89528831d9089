"""Single chunks as objects: encoded, written, read back and verified."""

import hashlib
import logging
import secrets
import struct
import threading
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from offload.errors import CorruptChunk, OffloadError
from offload.tiers.remote_block import BlockFormat, decode_frame, pack_block, parse_header
from offload.tiers.remote_bucket import Bucket
from offload.types import ChunkInfo, ChunkLayout

_LOG = logging.getLogger(__name__)
_INFO = struct.Struct("<QQQ")

SCRATCH = "scratch"
"""Prefix of what tiers write."""


class RemoteChunks:
    """Chunks of one layout in a folder of their own, each an object.

    Any thread may call any method.

    Attributes
    ----------
    prefix : str
        The folder, which nobody else knows.
    num_left_behind : int
        Objects that could not be removed; ``close`` tries again.

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
        self.prefix = f"{SCRATCH}/{secrets.token_hex(16)}"
        self.num_left_behind = 0
        self._lock = threading.Lock()
        self._num_names = 0

    def new_name(self) -> str:
        """Return a name that no object has had."""
        with self._lock:
            self._num_names += 1
            return f"{self.prefix}/{self._num_names - 1:012d}"

    def write(self, name: str, info: ChunkInfo, source: Tensor) -> None:
        """Write a chunk under a new name.

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

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, or leave them behind and say so."""
        try:
            self._bucket.delete(names)
        except OffloadError as error:
            with self._lock:
                self.num_left_behind += len(names)
            _LOG.warning("%d objects of freed chunks are left until close: %s", len(names), error)

    def close(self) -> None:
        """Remove every object, and close the bucket.

        Raises
        ------
        StorageError
            Some could not be removed; names the folder.
        """
        try:
            if self._num_names:
                self._bucket.delete([found.name for found in self._bucket.list(self.prefix)])
        finally:
            self._bucket.close()

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
