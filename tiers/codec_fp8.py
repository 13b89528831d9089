"""``fp8``: eight-bit floats, e4m3, with one power of two for all keys of a unit and one for values.

A payload is a header (the mode, 1; zero; the exponents of keys and of values, int16; two bytes of
zero) and a byte per element. Elements divided by their power of two are at most 416 in size, which
leaves 0x7E for infinity, 0xFE for minus infinity; 0x7F is NaN, as everywhere.

Notes
-----
Measured (docs/codecs.md): a power of two per channel changes nothing, and a float16 scale per token
or channel takes 1.6 to 3 % more bytes for 3 to 14 % less error, about what bytes are worth.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from offload.errors import CorruptChunk
from offload.tiers.codec_batch import Kernel, decode_units, encode_units, find_kernel
from offload.tiers.codec_payload import (
    FLOATS,
    Bytes,
    check_shift,
    check_unit,
    finite_peak,
    scaled,
    store,
)
from offload.tiers.codecs import Unit

_HEADER = struct.Struct("<BBhhxx")
_MODE = 1
_INFINITY, _NAN = 0x7E, 0x7F

_LARGEST = 416.0 / 512
"""The largest element is this times two to the power of 9."""


@dataclass(frozen=True)
class Float8Codec:
    """Encodes units of floats at a fixed rate, one byte per element.

    Parameters
    ----------
    is_compiled : bool
        Whether to use kernels, where numba is installed; results do not differ.
    """

    is_compiled: bool = True
    name = "fp8"
    number = 3
    is_lossless = False

    def max_bytes(self, unit: Unit) -> int:  # noqa: D102 - docstring inherited
        check_unit(self.name, unit, FLOATS)
        return _HEADER.size + unit.num_tokens * unit.shape[1]

    def encode(self, rows: Tensor, unit: Unit) -> list[bytes]:  # noqa: D102 - docstring inherited
        size, encode = self.max_bytes(unit), partial(_encode, unit)
        return encode_units(self._kernel("encode"), encode, rows, unit, size)

    def decode(  # noqa: D102 - docstring inherited
        self, payloads: Sequence[memoryview], unit: Unit, out: Tensor
    ) -> None:
        size, decode = self.max_bytes(unit), partial(_decode, unit)
        decode_units(self.name, self._kernel("decode"), decode, payloads, unit, out, size)

    def _kernel(self, function: str) -> Kernel | None:
        return find_kernel("cpu_codec_fp8", function) if self.is_compiled else None


def quantise(rows: Tensor) -> Tensor:
    """Return the codes, uint8, of float32 rows whose finite elements are at most 416 in size."""
    codes = rows.nan_to_num(0.0, 0.0, 0.0).to(torch.float8_e4m3fn).view(torch.uint8)
    codes[rows.isnan()] = _NAN
    codes[rows == torch.inf] = _INFINITY
    codes[rows == -torch.inf] = _INFINITY | 0x80
    return codes


def dequantise(codes: Tensor) -> Tensor:
    """Return the float32 rows of codes."""
    rows = codes.view(torch.float8_e4m3fn).float()
    rows[codes == _INFINITY] = torch.inf
    rows[codes == _INFINITY | 0x80] = -torch.inf
    return rows


def _exponent(peak: float) -> int:
    """Return the least power of two that makes ``peak`` at most 416."""
    fraction, exponent = math.frexp(peak)
    return exponent - 9 + (fraction > _LARGEST) if peak else 0


def _encode(unit: Unit, rows: Tensor) -> bytes:
    parts = rows.split([unit.key_dim, unit.value_dim], 1)
    exponents = [_exponent(finite_peak(part)) if part.numel() else 0 for part in parts]
    codes = [quantise(scaled(part, -exp)) for part, exp in zip(parts, exponents, strict=True)]
    return _HEADER.pack(_MODE, 0, *exponents) + torch.cat(codes, 1).numpy().tobytes()


def _decode(unit: Unit, payload: Bytes, out: Tensor) -> None:
    mode, zero, *exponents = _HEADER.unpack_from(payload.data)
    if mode != _MODE or zero or payload[6 : _HEADER.size].any():
        head = payload[: _HEADER.size].tolist()
        raise CorruptChunk(f"{Float8Codec.name}: a payload that begins with {head}")
    codes = torch.from_numpy(payload[_HEADER.size :].copy()).view(unit.shape)
    widths = [unit.key_dim, unit.value_dim]
    for own, rows, exponent in zip(
        codes.split(widths, 1), out.split(widths, 1), exponents, strict=True
    ):
        check_shift(Float8Codec.name, exponent)
        store(dequantise(own.contiguous()), rows, exponent)
