"""``int8``: symmetric around zero, one scale per 64 elements; the codes compressed if that helps.

Groups run along tokens for keys and along channels for values, as in ``kernels.kivi``. A payload is

====================  ==============================================================================
bytes                 content
====================  ==============================================================================
1                     mode: ``PLAIN`` or ``PACKED``
1                     zero
2                     int16, the shift: elements were divided by two to its power
2 per scale           float16: of keys ``[token groups, key_dim]``, of values ``[num_tokens, channel
                      groups]``; a minus sign marks groups with elements that are not finite
the rest              codes, int8 ``[num_tokens, key_dim + value_dim]``; of ``PACKED``, a zstd frame
====================  ==============================================================================

Codes go from -127 to 127; in marked groups to 126, ±127 being infinity and -128 NaN.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import zstandard
from torch import Tensor

from offload.errors import CorruptChunk
from offload.kernels.kivi import KEYS, VALUES, Axis, grouped, half_above, spread
from offload.tiers.codec_batch import Kernel, decode_units, encode_units, find_kernel
from offload.tiers.codec_payload import (
    FLOATS,
    GAIN,
    Bytes,
    check_scales,
    check_shift,
    check_unit,
    choose_shift,
    decompress,
    finite_peak,
    new_compressor,
    scale_shapes,
    scaled,
    store,
)
from offload.tiers.codecs import Unit

PLAIN, PACKED = 1, 2
GROUP = 64

_HEADER = struct.Struct("<BBh")
_LARGEST, _NAN = 127, -128


@dataclass(frozen=True)
class Int8Codec:
    """Halves 16 bits, whatever they are, and saves more where codes repeat.

    Parameters
    ----------
    is_packing : bool
        Whether to try zstd; payloads of either kind are decoded.
    is_compiled : bool
        Whether to use kernels, where numba is installed; results do not differ.
    """

    is_packing: bool = True
    is_compiled: bool = True
    name = "int8"
    number = 2
    is_lossless = False

    def max_bytes(self, unit: Unit) -> int:  # noqa: D102 - docstring inherited
        check_unit(self.name, unit, FLOATS)
        return _codes_start(unit) + unit.num_tokens * unit.shape[1]

    def encode(self, rows: Tensor, unit: Unit) -> list[bytes]:  # noqa: D102 - docstring inherited
        size, encode = self.max_bytes(unit), partial(_encode, unit)
        plain = encode_units(self._kernel("encode"), encode, rows, unit, size)
        if not self.is_packing:
            return plain
        compressor, start = new_compressor(), _codes_start(unit)
        return [_pack(payload, start, compressor) for payload in plain]

    def decode(  # noqa: D102 - docstring inherited
        self, payloads: Sequence[memoryview], unit: Unit, out: Tensor
    ) -> None:
        size, decode = self.max_bytes(unit), partial(_decode, unit)
        plain = [_unpack(np.frombuffer(payload, np.uint8), unit, size) for payload in payloads]
        decode_units(self.name, self._kernel("decode"), decode, plain, unit, out, size)

    def _kernel(self, function: str) -> Kernel | None:
        return find_kernel("cpu_codec_int8", function) if self.is_compiled else None


def quantise(rows: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Round float32 rows ``[num_tokens, dim]`` to codes; no element is off by over half a scale.

    Returns
    -------
    codes : Tensor, int8 [num_tokens, dim]
    scales : Tensor, float16 [num_groups, dim] or [num_tokens, num_groups]
    """
    is_finite = rows.isfinite()
    peaks = grouped(rows.abs().where(is_finite, 0.0), axis, GROUP).amax(axis)
    is_marked = ~grouped(is_finite, axis, GROUP).all(axis)
    most = torch.where(is_marked, _LARGEST - 1.0, _LARGEST)
    scales = half_above(peaks / most)
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    limit = spread(most, rows, axis, GROUP)
    codes = (rows * spread(inverse, rows, axis, GROUP)).round().clamp(-limit, limit)
    codes[rows.isinf()] = rows[rows.isinf()].sign() * _LARGEST
    codes[rows.isnan()] = _NAN
    return codes.to(torch.int8), torch.where(is_marked, -scales, scales)


def dequantise(codes: Tensor, scales: Tensor, axis: Axis) -> Tensor:
    """Return the float32 rows of codes."""
    own = spread(scales.float(), codes, axis, GROUP)
    rows = codes * own.abs()
    size = codes.int().abs()
    rows = rows.where(~own.signbit() | (size != _LARGEST), codes.sign() * torch.inf)
    return rows.where(~own.signbit() | (size != -_NAN), torch.nan)


def _pack(payload: bytes, start: int, compressor: zstandard.ZstdCompressor) -> bytes:
    """Return a payload with its codes compressed, if they become so much less."""
    codes = memoryview(payload)[start:]
    frame = compressor.compress(codes)
    if len(frame) > GAIN * len(codes):
        return payload
    return b"".join((bytes([PACKED]), payload[1:start], frame))


def _unpack(payload: Bytes, unit: Unit, size: int) -> Bytes:
    """Return a plain payload of ``size`` bytes."""
    start = _codes_start(unit)
    if len(payload) <= start or payload[0] != PACKED:
        return payload
    codes = decompress(Int8Codec.name, payload[start:], size - start)
    mode = np.array([PLAIN], np.uint8)
    return np.concatenate([mode, payload[1:start], codes])


def _encode(unit: Unit, rows: Tensor) -> bytes:
    shift = choose_shift(finite_peak(rows))
    keys, values = scaled(rows, -shift).split([unit.key_dim, unit.value_dim], 1)
    key_codes, key_scales = quantise(keys, KEYS)
    value_codes, value_scales = quantise(values, VALUES)
    parts = (key_scales, value_scales, torch.cat([key_codes, value_codes], 1))
    return _HEADER.pack(PLAIN, 0, shift) + b"".join(part.numpy().tobytes() for part in parts)


def _decode(unit: Unit, payload: Bytes, out: Tensor) -> None:
    mode, zero, shift = _HEADER.unpack_from(payload.data)
    if mode != PLAIN or zero:
        raise CorruptChunk(f"{Int8Codec.name}: a payload that begins with {mode}, {zero}")
    check_shift(Int8Codec.name, shift)
    start, shapes = _codes_start(unit), scale_shapes(unit, GROUP)
    scales = torch.from_numpy(payload[_HEADER.size : start].copy().view(np.float16))
    check_scales(Int8Codec.name, scales)
    codes = torch.from_numpy(payload[start:].view(np.int8)).view(unit.shape)
    parts = [
        dequantise(own, own_scales.view(shape), axis)
        for own, own_scales, shape, axis in zip(
            codes.split([unit.key_dim, unit.value_dim], 1),
            scales.split([math.prod(shape) for shape in shapes]),
            shapes,
            (KEYS, VALUES),
            strict=True,
        )
    ]
    store(torch.cat(parts, 1), out, shift)


def _codes_start(unit: Unit) -> int:
    return _HEADER.size + 2 * sum(math.prod(shape) for shape in scale_shapes(unit, GROUP))
