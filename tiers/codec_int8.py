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

import numpy as np
import torch
import zstandard
from torch import Tensor

from offload.errors import CorruptChunk
from offload.kernels.kivi import KEYS, VALUES, Axis, grouped, half_above, spread
from offload.tiers.codec_payload import (
    FLOATS,
    GAIN,
    ZSTD_LEVEL,
    Bytes,
    check_scales,
    check_shift,
    check_size,
    check_unit,
    choose_shift,
    decode_each,
    decompress,
    finite_peak,
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
    """Halves 16 bits, whatever they are, and saves more where codes repeat."""

    name = "int8"
    number = 2
    is_lossless = False

    def max_bytes(self, unit: Unit) -> int:  # noqa: D102 - docstring inherited
        check_unit(self.name, unit, FLOATS)
        return _HEADER.size + 2 * _num_scales(unit) + unit.num_tokens * unit.shape[1]

    def encode(self, rows: Tensor, unit: Unit) -> list[bytes]:  # noqa: D102 - docstring inherited
        check_unit(self.name, unit, FLOATS)
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True)
        return [_encode(own.float(), unit, compressor) for own in rows]

    def decode(  # noqa: D102 - docstring inherited
        self, payloads: Sequence[memoryview], unit: Unit, out: Tensor
    ) -> None:
        check_unit(self.name, unit, FLOATS)
        decode_each(self.name, lambda payload, rows: _decode(payload, unit, rows), payloads, out)


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


def _encode(rows: Tensor, unit: Unit, compressor: zstandard.ZstdCompressor) -> bytes:
    shift = choose_shift(finite_peak(rows))
    keys, values = scaled(rows, -shift).split([unit.key_dim, unit.value_dim], 1)
    key_codes, key_scales = quantise(keys, KEYS)
    value_codes, value_scales = quantise(values, VALUES)
    scales = b"".join(part.numpy().tobytes() for part in (key_scales, value_scales))
    codes = torch.cat([key_codes, value_codes], 1).numpy()
    frame = compressor.compress(codes)
    if len(frame) <= GAIN * codes.nbytes:
        return b"".join((_HEADER.pack(PACKED, 0, shift), scales, frame))
    return b"".join((_HEADER.pack(PLAIN, 0, shift), scales, codes))


def _decode(payload: Bytes, unit: Unit, out: Tensor) -> None:
    codes, scales, shift = _parse(payload, unit)
    of_keys, of_values = scale_shapes(unit, GROUP)
    key_scales, value_scales = scales.split([math.prod(of_keys), math.prod(of_values)])
    key_codes, value_codes = codes.split([unit.key_dim, unit.value_dim], 1)
    keys = dequantise(key_codes, key_scales.view(of_keys), KEYS)
    values = dequantise(value_codes, value_scales.view(of_values), VALUES)
    store(torch.cat([keys, values], 1), out, shift)


def _parse(payload: Bytes, unit: Unit) -> tuple[Tensor, Tensor, int]:
    """Return codes, scales and shift of a payload."""
    name, num_scales = Int8Codec.name, _num_scales(unit)
    start, num_codes = _HEADER.size + 2 * num_scales, unit.num_tokens * unit.shape[1]
    if len(payload) <= start:
        raise CorruptChunk(f"{name}: a payload of {len(payload)} bytes, not more than {start}")
    mode, zero, shift = _HEADER.unpack_from(payload)
    check_shift(name, shift)
    if mode not in (PLAIN, PACKED) or zero:
        raise CorruptChunk(f"{name}: a payload that begins with {mode}, {zero}")
    codes = payload[start:]
    if mode == PACKED:
        codes = decompress(name, codes, num_codes)
    check_size(name, codes, num_codes)
    scales = torch.from_numpy(payload[_HEADER.size : start].copy().view(np.float16))
    check_scales(name, scales)
    return torch.from_numpy(codes.copy()).view(torch.int8).view(unit.shape), scales, shift


def _num_scales(unit: Unit) -> int:
    return sum(math.prod(shape) for shape in scale_shapes(unit, GROUP))
