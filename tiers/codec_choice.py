"""Which chunks are stored encoded: all, or an even share of them."""

import threading

from offload.errors import ConfigError
from offload.tiers.codecs import Codec
from offload.types import ChunkInfo


class CodecChoice:
    """Says how each chunk is stored, for ``DiskTier(choose_codec=...)``.

    Of every layer the encoded chunks are spread evenly over the positions, so that what a query
    reads is encoded to about the same share wherever it lies. What is on disk stays as it is; a
    change is for chunks that are written from then on. Any thread may call any method.

    Parameters
    ----------
    chunk_tokens : int
    codec : Codec
        Of those that are encoded; the others are raw.
    share : float
        From 0 to 1.
    """

    def __init__(self, chunk_tokens: int, codec: Codec, share: float = 1.0) -> None:
        self._chunk_tokens = chunk_tokens
        self._lock = threading.Lock()
        self.change(codec, share)

    @property
    def current(self) -> tuple[Codec, float]:
        """The codec, and the share of chunks that get it."""
        with self._lock:
            return self._codec, self._share

    def change(self, codec: Codec, share: float) -> None:
        """Choose otherwise from now on.

        Raises
        ------
        ConfigError
            The share is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"a share of {share!r} of the chunks is not from 0 to 1")
        with self._lock:
            self._codec, self._share = codec, share

    def __call__(self, info: ChunkInfo) -> Codec | None:
        """Return the codec of a chunk; None: raw."""
        codec, share = self.current
        position = info.first_token // self._chunk_tokens
        is_encoded = int((position + 1) * share) > int(position * share)
        return codec if is_encoded and codec.number else None
