"""Units to payloads of ``fp8`` and back; needs numba.

``tiers.codec_fp8`` has the format and the definition. Units that are not finite, or of a size far
from that of keys and values, are left to it.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels.cpu_codec_rows import F32, MOST_PEAK, U32, narrow, widen
from offload.kernels.cpu_intrinsics import as_bits, as_float, from_half

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_HEADER_BYTES = 8
_LEAST_PEAK = np.uint32(0x0D800000)
"""Bits of 2**-100: the powers of two that occur are far from the ends of float32."""

_LEAST_EXPONENT, _MOST_EXPONENT = -110, 7
_LARGEST_FRACTION = np.uint32(0x500000)
"""Mantissa of 416."""

_LEAST_NORMAL = np.uint32(0x3C800000)
_INFINITY = np.uint8(0x7E)


@njit(nogil=True, cache=True)
def encode(
    rows: Bytes,
    kind: int,
    shape: tuple[int, int, int],
    payloads: Bytes,
    is_done: NDArray[np.bool_],
) -> None:
    """Encode units; parameters as of ``cpu_codec_kivi.encode``."""
    num_tokens, key_dim, value_dim = shape
    dim = key_dim + value_dim
    wide = np.empty((num_tokens, dim), np.float32)
    for unit in range(len(rows)):
        widen(rows[unit], kind, wide.ravel())
        peak, value_peak = _peak(wide[:, :key_dim]), _peak(wide[:, key_dim:])
        is_done[unit] = _is_usual(peak) and _is_usual(value_peak)
        if not is_done[unit]:
            continue
        payload = payloads[unit]
        payload[:_HEADER_BYTES] = 0
        payload[0] = 1
        exponents = payload[2:6].view(np.int16)
        exponents[0], exponents[1] = _exponent(peak), _exponent(value_peak)
        by_key, by_value = _power(-exponents[0]), _power(-exponents[1])
        for token in range(num_tokens):
            start = _HEADER_BYTES + token * dim
            codes = payload[start : start + dim]
            _encode_row(wide[token, :key_dim], by_key, codes[:key_dim])
            _encode_row(wide[token, key_dim:], by_value, codes[key_dim:])


@njit(nogil=True, cache=True)
def decode(
    payloads: Bytes,
    kind: int,
    shape: tuple[int, int, int],
    rows: Bytes,
    is_done: NDArray[np.bool_],
) -> None:
    """Undo ``encode``; parameters as of ``cpu_codec_kivi.decode``.

    ``is_done`` is False for payloads with another header, or with codes of what is not finite.
    """
    num_tokens, key_dim, value_dim = shape
    wide = np.empty((num_tokens, key_dim + value_dim), np.float32)
    for unit in range(len(payloads)):
        is_done[unit] = unpack(payloads[unit], key_dim, wide)
        if is_done[unit]:
            narrow(wide.ravel(), kind, rows[unit])


@njit(nogil=True, cache=True)
def unpack(payload: Bytes, key_dim: int, wide: Floats) -> np.bool_:
    """Set the float32 rows ``[num_tokens, row_dim]`` of one payload; False as ``decode`` says."""
    num_tokens, dim = wide.shape
    exponents = payload[2:6].view(np.int16)
    is_done: np.bool_ = (
        payload[0] == 1
        and payload[1] == 0
        and payload[6] == 0
        and payload[7] == 0
        and min(exponents[0], exponents[1]) >= _LEAST_EXPONENT
        and max(exponents[0], exponents[1]) <= _MOST_EXPONENT
        and _are_finite(payload[_HEADER_BYTES:])
    )
    if is_done:
        by_key, by_value = _power(exponents[0]), _power(exponents[1])
        for token in range(num_tokens):
            start = _HEADER_BYTES + token * dim
            codes = payload[start : start + dim]
            _decode_row(codes[:key_dim], by_key, wide[token, :key_dim])
            _decode_row(codes[key_dim:], by_value, wide[token, key_dim:])
    return is_done


@njit(nogil=True, cache=True)
def _peak(rows: Floats) -> np.uint32:
    """Return the bits of the largest absolute value."""
    peak = U32(0)
    for token in range(len(rows)):
        row = rows[token]
        for i in range(len(row)):
            peak = max(peak, as_bits(row[i]) & U32(0x7FFFFFFF))
    return peak


@njit(inline="always")
def _is_usual(peak: np.uint32) -> np.bool_:
    is_usual: np.bool_ = (peak == U32(0)) | ((peak >= _LEAST_PEAK) & (peak < MOST_PEAK))
    return is_usual


@njit(inline="always")
def _exponent(peak: np.uint32) -> np.int32:
    """Return the least power of two that makes a number at most 416."""
    fits = (peak & U32(0x7FFFFF)) <= _LARGEST_FRACTION
    exponent = np.int32(peak >> U32(23)) - np.int32(135 if fits else 134)
    return exponent if peak > U32(0) else np.int32(0)


@njit(inline="always")
def _power(exponent: int) -> np.float32:
    power: np.float32 = as_float(U32(exponent + 127) << U32(23))
    return power


@njit(nogil=True, cache=True)
def _encode_row(row: Floats, factor: np.float32, codes: Bytes) -> None:
    for i in range(len(row)):
        bits = as_bits(row[i] * factor)
        size = bits & U32(0x7FFFFFFF)
        # To the nearest with three bits of mantissa, even if there are two; and re-biased.
        normal = ((size + U32(0x7FFFF) + ((size >> U32(20)) & U32(1))) >> U32(20)) - U32(960)
        # The sum is a multiple of 2**-9, of which float32 keeps the count in its lowest bits.
        small = as_bits(as_float(size) + F32(2.0**14)) & U32(15)
        code = normal if size >= _LEAST_NORMAL else small
        codes[i] = np.uint8(code | (bits >> U32(24) & U32(0x80)))


@njit(nogil=True, cache=True)
def _decode_row(codes: Bytes, factor: np.float32, row: Floats) -> None:
    wide = factor * F32(256)
    for i in range(len(row)):
        code = np.uint16(codes[i])
        half = np.uint16((code & np.uint16(0x80)) << np.uint16(8)) | np.uint16(
            (code & np.uint16(0x7F)) << np.uint16(7)
        )
        row[i] = from_half(np.uint16(half)) * wide


@njit(nogil=True, cache=True)
def _are_finite(codes: Bytes) -> np.bool_:
    most = np.uint8(0)
    for i in range(len(codes)):
        most = max(most, np.uint8(codes[i] & np.uint8(0x7F)))
    return most < _INFINITY
