"""``bf16x``: exponents compressed, everything else as it is. Lossless.

Of a bfloat16 the sign and the mantissa are noise, and the exponent has less than three bits of
news. A byte of payload says which of two ways follow:

* ``RAW``: the rows.
* ``PLANES``: the lower bytes of all elements, in rows; then one zstd frame of the largest high byte
  of each channel, and of how far each element's is below. Elements are rotated left by one bit
  first, so that the high byte is all exponent (float16: with three bits of mantissa).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from offload.errors import CorruptChunk
from offload.kernels.dispatch import compiled
from offload.tiers.codec_payload import (
    GAIN,
    Bytes,
    check_size,
    check_unit,
    decode_each,
    decompress,
    new_compressor,
)
from offload.tiers.codecs import Unit

RAW, PLANES = 0, 1

_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Elements as numbers, by their bytes; those of one byte have no exponent to speak of."""

Words = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class ExponentCodec:
    """Takes any dtype; made for bfloat16, of float16 it saves a seventh, of float32 a sixth.

    Parameters
    ----------
    is_compiled : bool
        Whether to use kernels, where numba is installed; results do not differ.
    """

    is_compiled: bool = True
    name = "bf16x"
    number = 1
    is_lossless = True

    def max_bytes(self, unit: Unit) -> int:  # noqa: D102 - docstring inherited
        check_unit(self.name, unit)
        return 1 + unit.num_bytes

    def encode(self, rows: Tensor, unit: Unit) -> list[bytes]:  # noqa: D102 - docstring inherited
        check_unit(self.name, unit)
        compressor = new_compressor()
        return [self._encode(own, unit, compressor) for own in rows]

    def decode(  # noqa: D102 - docstring inherited
        self, payloads: Sequence[memoryview], unit: Unit, out: Tensor
    ) -> None:
        def decode(payload: Bytes, rows: Tensor) -> None:
            self._decode(payload, unit, rows.view(torch.uint8).numpy().reshape(-1))

        decode_each(self.name, decode, payloads, out)

    def _encode(self, rows: Tensor, unit: Unit, compressor: zstandard.ZstdCompressor) -> bytes:
        flat = rows.view(torch.uint8).numpy()
        if unit.dtype.itemsize in _WORDS:
            high, low = self._split(flat.view(_WORDS[unit.dtype.itemsize]))
            frame = compressor.compress(high.data)
            if low.nbytes + len(frame) <= GAIN * flat.nbytes:
                return b"".join((bytes([PLANES]), low.data, frame))
        return b"".join((bytes([RAW]), flat.data))

    def _decode(self, payload: Bytes, unit: Unit, out: Bytes) -> None:
        size = unit.dtype.itemsize
        if payload[0] == RAW:
            check_size(self.name, payload, 1 + unit.num_bytes)
            out[:] = payload[1:]
            return
        if payload[0] != PLANES or size not in _WORDS:
            raise CorruptChunk(f"{self.name}: mode {payload[0]}, elements of {size} bytes")
        low_bytes = unit.num_bytes // size * (size - 1)
        if len(payload) <= 1 + low_bytes:
            raise CorruptChunk(
                f"{self.name}: a payload of {len(payload)} bytes, not more than {1 + low_bytes}"
            )
        dim = unit.shape[1]
        low = payload[1 : 1 + low_bytes].reshape(unit.num_tokens, dim, size - 1)
        num_high = dim * (1 + unit.num_tokens)
        high = decompress(self.name, payload[1 + low_bytes :], num_high).reshape(-1, dim)
        self._join(high, low, out.view(_WORDS[size]).reshape(unit.shape))

    def _split(self, words: Words) -> tuple[Bytes, Bytes]:
        fast = self._kernels(words)
        if fast is None:
            return split(words)
        num_tokens, dim = words.shape
        high, low = np.empty((1 + num_tokens, dim), np.uint8), np.empty(words.shape, np.uint8)
        fast.split(words, high, low)
        return high, low[..., None]

    def _join(self, high: Bytes, low: Bytes, out: Words) -> None:
        fast = self._kernels(out)
        if fast is None:
            join(high, low, out)
        else:
            # Copies, because a kernel is compiled anew for memory that is not to be written.
            fast.join(high.copy(), low[..., 0].copy(), out)

    def _kernels(self, words: Words) -> ModuleType | None:
        is_taken = self.is_compiled and words.dtype == np.uint16
        return compiled("cpu_codec_planes") if is_taken else None


def split(words: Words) -> tuple[Bytes, Bytes]:
    """Take rows of elements apart.

    Parameters
    ----------
    words : ndarray, unsigned [num_tokens, dim]

    Returns
    -------
    high : ndarray, uint8 [1 + num_tokens, dim]
        The largest of each channel, and the differences from it.
    low : ndarray, uint8 [num_tokens, dim, itemsize - 1]
    """
    size = words.itemsize
    rotated = (words << 1) | (words >> (8 * size - 1))
    planes = rotated.view(np.uint8).reshape(*words.shape, size)
    high = planes[..., size - 1]
    top = high.max(0, keepdims=True)
    return np.concatenate([top, top - high]), np.ascontiguousarray(planes[..., : size - 1])


def join(high: Bytes, low: Bytes, out: Words) -> None:
    """Undo ``split``; bytes that it never makes give other elements, no error."""
    size = out.itemsize
    planes = np.empty((*out.shape, size), np.uint8)
    planes[..., size - 1] = high[0] - high[1:]
    planes[..., : size - 1] = low
    rotated = planes.reshape(out.shape[0], -1).view(out.dtype)
    out[:] = (rotated >> 1) | (rotated << (8 * size - 1))
