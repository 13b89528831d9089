"""Units to payloads of ``kivi4`` and ``kivi2`` and back; needs numba.

``kernels.kivi`` defines the numbers and ``tiers.codec_kivi`` the format. Units that are not finite
or need a shift are left to these.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels.cpu_codec_rows import (
    F32,
    LEAST_PEAK,
    MOST_PEAK,
    half_above,
    half_below,
    narrow,
    widen,
)
from offload.kernels.cpu_intrinsics import from_half, sortable, to_half, unsortable
from offload.kernels.cpu_unpack import (
    unpack_keys_2,
    unpack_keys_4,
    unpack_values_2,
    unpack_values_4,
)

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_GROUP = 32
_HEADER_BYTES = 16
_SIGN, _NOT_FINITE = np.uint16(0x8000), np.uint16(0x7C00)


@njit(nogil=True, cache=True)
def encode(
    num_bits: int,
    rows: Bytes,
    kind: int,
    shape: tuple[int, int, int],
    payloads: Bytes,
    is_done: NDArray[np.bool_],
) -> None:
    """Encode units.

    Parameters
    ----------
    num_bits : {4, 2}
    rows : uint8 [num_units, bytes of a unit]
    kind : int
        Code of the dtype, of ``cpu_products``.
    shape : tuple of int
        Tokens, channels of keys, channels of values.
    payloads : uint8 [num_units, bytes of a payload]
        Set.
    is_done : bool [num_units]
        Set; False: the unit is not for this kernel.
    """
    num_tokens, key_dim, value_dim = shape
    wide = np.empty((num_tokens, key_dim + value_dim), np.float32)
    low = np.empty((-(-num_tokens // _GROUP), key_dim), np.float32)
    value_low = np.empty((num_tokens, -(-value_dim // _GROUP)), np.float32)
    high, value_high = np.empty_like(low), np.empty_like(value_low)
    for unit in range(len(rows)):
        peak = widen(rows[unit], kind, wide.ravel())
        is_done[unit] = peak == 0 or (peak >= LEAST_PEAK and peak < MOST_PEAK)
        if not is_done[unit]:
            continue
        payload = payloads[unit]
        payload[:_HEADER_BYTES] = 0
        payload[0] = 1
        place = _HEADER_BYTES
        _bound_keys(wide, low, high)
        place = _store_scales(low.ravel(), high.ravel(), num_bits, payload, place)
        _bound_values(wide, key_dim, value_low, value_high)
        place = _store_scales(value_low.ravel(), value_high.ravel(), num_bits, payload, place)
        _encode_rows(wide, low, high, value_low, value_high, num_bits, payload[place:])


@njit(nogil=True, cache=True)
def decode(
    num_bits: int,
    payloads: Bytes,
    kind: int,
    shape: tuple[int, int, int],
    rows: Bytes,
    is_done: NDArray[np.bool_],
) -> None:
    """Undo ``encode``; parameters as there.

    ``is_done`` is False for payloads with another header, or with scales that are negative or not
    finite.
    """
    num_tokens, key_dim, value_dim = shape
    wide = np.empty((num_tokens, key_dim + value_dim), np.float32)
    for unit in range(len(payloads)):
        is_done[unit] = unpack(num_bits, payloads[unit], key_dim, wide)
        if is_done[unit]:
            narrow(wide.ravel(), kind, rows[unit])


@njit(nogil=True, cache=True)
def unpack(num_bits: int, payload: Bytes, key_dim: int, wide: Floats) -> np.bool_:
    """Set the float32 rows ``[num_tokens, row_dim]`` of one payload; False as ``decode`` says."""
    num_tokens, dim = wide.shape
    scales = np.empty((-(-num_tokens // _GROUP), key_dim), np.float32)
    value_scales = np.empty((num_tokens, -(-(dim - key_dim) // _GROUP)), np.float32)
    zeros, value_zeros = np.empty_like(scales), np.empty_like(value_scales)
    is_plain = payload[0] == 1
    for i in range(1, _HEADER_BYTES):
        is_plain &= payload[i] == 0
    place = _HEADER_BYTES
    keys_are_plain, place = _load_scales(payload, place, scales.ravel(), zeros.ravel())
    values_are_plain, place = _load_scales(
        payload, place, value_scales.ravel(), value_zeros.ravel()
    )
    is_done: np.bool_ = is_plain and keys_are_plain and values_are_plain
    if is_done:
        codes = payload[place:]
        _decode_rows(codes, num_bits, scales, zeros, value_scales, value_zeros, wide)
    return is_done


@njit(nogil=True, cache=True)
def _bound_keys(wide: Floats, low: Floats, high: Floats) -> None:
    """Set the bounds of each channel ``[token groups, key_dim]``."""
    key_dim = low.shape[1]
    for group in range(len(low)):
        start, own_low, own_high = group * _GROUP, low[group], high[group]
        own_low[:] = wide[start, :key_dim]
        own_high[:] = wide[start, :key_dim]
        for token in range(start + 1, min(start + _GROUP, len(wide))):
            row = wide[token]
            for i in range(key_dim):
                own_low[i] = min(own_low[i], row[i])
                own_high[i] = max(own_high[i], row[i])


@njit(nogil=True, cache=True)
def _bound_values(wide: Floats, key_dim: int, low: Floats, high: Floats) -> None:
    """Set the bounds of each token ``[num_tokens, channel groups]``."""
    for token in range(len(wide)):
        row = wide[token, key_dim:]
        for group in range(low.shape[1]):
            own = row[group * _GROUP : (group + 1) * _GROUP]
            least = most = sortable(own[0])
            for i in range(len(own)):
                number = sortable(own[i])
                least, most = min(least, number), max(most, number)
            low[token, group], high[token, group] = unsortable(least), unsortable(most)


@njit(nogil=True, cache=True)
def _store_scales(low: Floats, high: Floats, num_bits: int, payload: Bytes, place: int) -> int:
    """Write scales and zeros; ``low`` becomes the zeros, ``high`` the inverse scales."""
    size, steps = len(low), F32((1 << num_bits) - 1)
    scales = payload[place : place + 2 * size].view(np.uint16)
    zeros = payload[place + 2 * size : place + 4 * size].view(np.uint16)
    for i in range(size):
        zero = half_below(low[i])
        scale = half_above((high[i] - zero) / steps)
        low[i], high[i] = zero, F32(1) / scale if scale > F32(0) else F32(0)
        scales[i], zeros[i] = to_half(scale), to_half(zero)
    return place + 4 * size


@njit(nogil=True, cache=True)
def _load_scales(payload: Bytes, place: int, scales: Floats, zeros: Floats) -> tuple[np.bool_, int]:
    """Set scales and zeros; say whether the kernel can go on with them."""
    size = len(scales)
    own = payload[place : place + 2 * size].view(np.uint16)
    own_zeros = payload[place + 2 * size : place + 4 * size].view(np.uint16)
    largest = np.uint16(0)
    for i in range(size):
        scales[i], zeros[i] = from_half(own[i]), from_half(own_zeros[i])
        largest = max(largest, own[i], own_zeros[i] & ~_SIGN)
    return largest < _NOT_FINITE, place + 4 * size


@njit(nogil=True, cache=True)
def _encode_rows(
    wide: Floats,
    zeros: Floats,
    inverse: Floats,
    value_zeros: Floats,
    value_inverse: Floats,
    num_bits: int,
    codes: Bytes,
) -> None:
    key_dim = zeros.shape[1]
    key_width, width = _widths(wide.shape[1], key_dim, num_bits)
    own_zeros = np.empty(wide.shape[1] - key_dim, np.float32)
    own_inverse = np.empty_like(own_zeros)
    for token in range(len(wide)):
        group, row = token // _GROUP, wide[token]
        own = codes[token * width : (token + 1) * width]
        _encode_row(row[:key_dim], zeros[group], inverse[group], num_bits, own[:key_width])
        _spread(value_zeros[token], own_zeros)
        _spread(value_inverse[token], own_inverse)
        _encode_row(row[key_dim:], own_zeros, own_inverse, num_bits, own[key_width:])


@njit(nogil=True, cache=True)
def _decode_rows(
    codes: Bytes,
    num_bits: int,
    scales: Floats,
    zeros: Floats,
    value_scales: Floats,
    value_zeros: Floats,
    wide: Floats,
) -> None:
    key_dim = zeros.shape[1]
    key_width, width = _widths(wide.shape[1], key_dim, num_bits)
    if key_dim * num_bits % 128 == 0 and width % 16 == 0 and wide.shape[1] * num_bits % 128 == 0:
        _unpack_rows(codes, num_bits, scales, zeros, value_scales, value_zeros, wide)
        return
    own_zeros = np.empty(wide.shape[1] - key_dim, np.float32)
    own_scales = np.empty_like(own_zeros)
    for token in range(len(wide)):
        group, row = token // _GROUP, wide[token]
        own = codes[token * width : (token + 1) * width]
        _decode_row(own[:key_width], num_bits, scales[group], zeros[group], row[:key_dim])
        _spread(value_scales[token], own_scales)
        _spread(value_zeros[token], own_zeros)
        _decode_row(own[key_width:], num_bits, own_scales, own_zeros, row[key_dim:])


@njit(nogil=True, cache=True)
def _unpack_rows(
    codes: Bytes,
    num_bits: int,
    scales: Floats,
    zeros: Floats,
    value_scales: Floats,
    value_zeros: Floats,
    wide: Floats,
) -> None:
    """Do what ``_decode_rows`` does, 16 channels at a time, which both widths are a multiple of."""
    num_tokens, dim = wide.shape
    key_dim, num_groups = zeros.shape[1], value_zeros.shape[1]
    steps = key_dim * num_bits // 128
    value_steps = (dim - key_dim) * num_bits // 128
    # Signed: numba adds unsigned and signed integers as floats.
    code, row = np.int64(codes.ctypes.data), np.int64(wide.ctypes.data)
    first_scale, first_zero = np.int64(scales.ctypes.data), np.int64(zeros.ctypes.data)
    value_scale = np.int64(value_scales.ctypes.data)
    value_zero = np.int64(value_zeros.ctypes.data)
    for token in range(num_tokens):
        group = 4 * key_dim * (token // _GROUP)
        scale, zero = first_scale + group, first_zero + group
        value_code, value = code + 16 * steps, row + 4 * key_dim
        if num_bits == 4:
            unpack_keys_4(code, steps, scale, zero, row)
            unpack_values_4(value_code, value_steps, value_scale, value_zero, value)
        else:
            unpack_keys_2(code, steps, scale, zero, row)
            unpack_values_2(value_code, value_steps, value_scale, value_zero, value)
        code, row = value_code + 16 * value_steps, row + 4 * dim
        value_scale, value_zero = value_scale + 4 * num_groups, value_zero + 4 * num_groups


@njit(inline="always")
def _widths(dim: int, key_dim: int, num_bits: int) -> tuple[int, int]:
    """Return the bytes of the codes of a key, and of a key and its value."""
    key_width = (key_dim * num_bits + 7) // 8
    return key_width, key_width + ((dim - key_dim) * num_bits + 7) // 8


@njit(nogil=True, cache=True)
def _spread(groups: Floats, channels: Floats) -> None:
    for group in range(len(groups)):
        channels[group * _GROUP : (group + 1) * _GROUP] = groups[group]


@njit(nogil=True, cache=True)
def _encode_row(row: Floats, zeros: Floats, inverse: Floats, num_bits: int, codes: Bytes) -> None:
    width, most = len(codes), np.int32((1 << num_bits) - 1)
    codes[:] = 0
    for shift in range(0, 8, num_bits):
        # Slices from zero: an index that might be negative is not computed on all lanes at once.
        start = shift // num_bits * width
        own, own_zeros, own_inverse = row[start:], zeros[start:], inverse[start:]
        by = np.int32(shift)
        for i in range(min(width, len(own))):
            number = np.int32((own[i] - own_zeros[i]) * own_inverse[i] + F32(0.5))
            codes[i] |= np.uint8(min(number, most) << by)


@njit(nogil=True, cache=True)
def _decode_row(codes: Bytes, num_bits: int, scales: Floats, zeros: Floats, row: Floats) -> None:
    width, mask = len(codes), np.int32((1 << num_bits) - 1)
    for shift in range(0, 8, num_bits):
        start = shift // num_bits * width
        own, own_zeros, own_scales = row[start:], zeros[start:], scales[start:]
        by = np.int32(shift)
        for i in range(min(width, len(own))):
            code = F32((np.int32(codes[i]) >> by) & mask)
            own[i] = own_zeros[i] + own_scales[i] * code
