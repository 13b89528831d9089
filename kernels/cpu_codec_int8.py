"""Units to plain payloads of ``int8`` and back; needs numba.

``tiers.codec_int8`` has the format and the definition. Units that are not finite or need a shift
are left to it.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels.cpu_codec_rows import (
    F32,
    LEAST_PEAK,
    MOST_PEAK,
    U32,
    half_above,
    narrow,
    widen,
)
from offload.kernels.cpu_intrinsics import as_bits, as_float, from_half, to_half
from offload.kernels.cpu_unpack import scale_keys, scale_values

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_GROUP = 64
_HEADER_BYTES = 4
_LARGEST = F32(127)
_NOT_FINITE = np.uint16(0x7C00)

_WHOLE = F32(1.5 * 2**23)
"""Added, it leaves no bits for what is not whole; then subtracted, a number is rounded."""


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
    wide = np.empty((num_tokens, key_dim + value_dim), np.float32)
    peaks = np.empty((-(-num_tokens // _GROUP), key_dim), np.float32)
    value_peaks = np.empty((num_tokens, -(-value_dim // _GROUP)), np.float32)
    for unit in range(len(rows)):
        peak = widen(rows[unit], kind, wide.ravel())
        is_done[unit] = peak == 0 or (peak >= LEAST_PEAK and peak < MOST_PEAK)
        if not is_done[unit]:
            continue
        payload = payloads[unit]
        payload[:_HEADER_BYTES] = 0
        payload[0] = 1
        _find_peaks(wide, peaks, value_peaks)
        place = _store_scales(peaks.ravel(), payload, _HEADER_BYTES)
        place = _store_scales(value_peaks.ravel(), payload, place)
        codes = payload[place:].view(np.int8)
        _encode_rows(wide, peaks, value_peaks, codes)


@njit(nogil=True, cache=True)
def decode(
    payloads: Bytes,
    kind: int,
    shape: tuple[int, int, int],
    rows: Bytes,
    is_done: NDArray[np.bool_],
) -> None:
    """Undo ``encode``; parameters as of ``cpu_codec_kivi.decode``."""
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
    scales = np.empty((-(-num_tokens // _GROUP), key_dim), np.float32)
    value_scales = np.empty((num_tokens, -(-(dim - key_dim) // _GROUP)), np.float32)
    is_plain = payload[0] == 1 and payload[1] == 0 and payload[2] == 0 and payload[3] == 0
    keys_are_plain, place = _load_scales(payload, _HEADER_BYTES, scales.ravel())
    values_are_plain, place = _load_scales(payload, place, value_scales.ravel())
    is_done: np.bool_ = is_plain and keys_are_plain and values_are_plain
    if is_done:
        _decode_rows(payload[place:].view(np.int8), scales, value_scales, wide)
    return is_done


@njit(nogil=True, cache=True)
def _find_peaks(wide: Floats, peaks: Floats, value_peaks: Floats) -> None:
    """Set the largest absolute values of each channel of keys and each token of values."""
    key_dim = peaks.shape[1]
    peaks[:] = 0
    for token in range(len(wide)):
        own, row = peaks[token // _GROUP], wide[token]
        for i in range(key_dim):
            own[i] = max(own[i], abs(row[i]))
        for group in range(value_peaks.shape[1]):
            start = key_dim + group * _GROUP
            numbers = row[start : start + _GROUP]
            most = U32(0)
            for i in range(len(numbers)):
                most = max(most, as_bits(numbers[i]) & U32(0x7FFFFFFF))
            value_peaks[token, group] = as_float(most)


@njit(nogil=True, cache=True)
def _store_scales(peaks: Floats, payload: Bytes, place: int) -> int:
    """Write scales; ``peaks`` become their inverse."""
    end = place + 2 * len(peaks)
    scales = payload[place:end].view(np.uint16)
    for i in range(len(peaks)):
        scale = half_above(peaks[i] / _LARGEST)
        peaks[i] = F32(1) / scale if scale > F32(0) else F32(0)
        scales[i] = to_half(scale)
    return end


@njit(nogil=True, cache=True)
def _load_scales(payload: Bytes, place: int, scales: Floats) -> tuple[np.bool_, int]:
    """Set scales; say whether all are finite and none is negative."""
    end = place + 2 * len(scales)
    own = payload[place:end].view(np.uint16)
    largest = np.uint16(0)
    for i in range(len(scales)):
        scales[i] = from_half(own[i])
        largest = max(largest, own[i])
    return largest < _NOT_FINITE, end


@njit(nogil=True, cache=True)
def _encode_rows(
    wide: Floats, inverse: Floats, value_inverse: Floats, codes: NDArray[np.int8]
) -> None:
    dim = wide.shape[1]
    own_inverse = np.empty(dim, np.float32)
    for token in range(len(wide)):
        _spread(inverse[token // _GROUP], value_inverse[token], own_inverse)
        row, own = wide[token], codes[token * dim : (token + 1) * dim]
        for i in range(dim):
            number = (row[i] * own_inverse[i] + _WHOLE) - _WHOLE
            own[i] = np.int8(np.int32(min(max(number, -_LARGEST), _LARGEST)))


@njit(nogil=True, cache=True)
def _decode_rows(
    codes: NDArray[np.int8], scales: Floats, value_scales: Floats, wide: Floats
) -> None:
    dim, key_dim = wide.shape[1], scales.shape[1]
    if key_dim % 16 == 0 and dim % 16 == 0:
        _scale_rows(codes, scales, value_scales, wide)
        return
    own_scales = np.empty(dim, np.float32)
    for token in range(len(wide)):
        _spread(scales[token // _GROUP], value_scales[token], own_scales)
        row, own = wide[token], codes[token * dim : (token + 1) * dim]
        for i in range(dim):
            row[i] = F32(own[i]) * own_scales[i]


@njit(nogil=True, cache=True)
def _scale_rows(
    codes: NDArray[np.int8], scales: Floats, value_scales: Floats, wide: Floats
) -> None:
    """Do what ``_decode_rows`` does, 16 channels at a time, which both widths are a multiple of."""
    num_tokens, dim = wide.shape
    key_dim, num_groups = scales.shape[1], value_scales.shape[1]
    # Signed: numba adds unsigned and signed integers as floats.
    code, row = np.int64(codes.ctypes.data), np.int64(wide.ctypes.data)
    scale, value_scale = np.int64(scales.ctypes.data), np.int64(value_scales.ctypes.data)
    for token in range(num_tokens):
        own = scale + 4 * key_dim * (token // _GROUP)
        scale_keys(code, key_dim // 16, own, row)
        scale_values(code + key_dim, (dim - key_dim) // 16, value_scale, row + 4 * key_dim)
        code, row, value_scale = code + dim, row + 4 * dim, value_scale + 4 * num_groups


@njit(nogil=True, cache=True)
def _spread(keys: Floats, values: Floats, channels: Floats) -> None:
    """Set the scale of each channel of a token."""
    channels[: len(keys)] = keys
    own = channels[len(keys) :]
    for group in range(len(values)):
        own[group * _GROUP : (group + 1) * _GROUP] = values[group]
