"""Channel-major codes of keys, compiled; ``kernels.sparf`` has the definitions. Needs numba."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels.cpu_intrinsics import as_bits, as_float, load_u8, widen
from offload.kernels.cpu_sparf_tiles import transpose_16

F32, U32 = np.float32, np.uint32
Codes = NDArray[np.int8]
Floats = NDArray[np.float32]
Places = NDArray[np.int64]

_LARGEST = F32(127)
_LEAST_PEAK = F32(2.0**-100)
_NOT_FINITE = U32(0x7F800000)

_WHOLE = F32(1.5 * 2**23)
"""Added to a small number it leaves the nearest integer in the low bits, halves to even."""

_LINES = 16
"""Tokens that are transposed together."""

_JOINED_CHANNELS = 8
"""Channels whose runs are joined together: few enough to be written at a time, while of each part
so many neighbouring runs are read."""


@njit(nogil=True, cache=True)
def encode_channels(keys: NDArray[Any], codes: Codes, scales: Floats) -> None:
    """Set codes and scales of keys.

    Parameters
    ----------
    keys : float32, or the bits of bfloat16 (uint16) or float16 (int16) [num_heads, num_tokens, dim]
    codes : int8 [num_heads, dim, num_tokens]
    scales : float32 [num_heads, dim]
    """
    num_heads, num_tokens, dim = keys.shape
    inverse = np.empty(dim, np.float32)
    lines = np.empty((_LINES, dim), np.int8)
    for head in range(num_heads):
        _find_scales(keys[head], scales[head], inverse)
        for first in range(0, num_tokens, _LINES):
            rows = keys[head, first : first + _LINES]
            for token in range(len(rows)):
                _round(rows[token], inverse, lines[token])
            _transpose(lines[: len(rows)], codes[head, :, first : first + len(rows)])


@njit(nogil=True, cache=True)
def _find_scales(keys: NDArray[Any], scales: Floats, inverse: Floats) -> None:
    peaks = np.zeros(len(scales), np.uint32)
    for token in range(len(keys)):
        row = keys[token]
        for i in range(len(peaks)):
            size = as_bits(widen(row[i])) & U32(0x7FFFFFFF)
            peaks[i] = max(peaks[i], size if size < _NOT_FINITE else U32(0))
    for i in range(len(peaks)):
        peak = as_float(peaks[i])
        is_some = peak >= _LEAST_PEAK
        scales[i] = peak / _LARGEST if is_some else F32(0)
        inverse[i] = _LARGEST / peak if is_some else F32(0)


@njit(nogil=True, cache=True)
def _round(row: NDArray[Any], inverse: Floats, codes: Codes) -> None:
    for i in range(len(codes)):
        number = widen(row[i]) * inverse[i]
        number = number if number == number else F32(0)
        number = min(max(number, -_LARGEST), _LARGEST)
        codes[i] = np.int8(as_bits(number + _WHOLE))


@njit(nogil=True, cache=True)
def _transpose(lines: Codes, codes: Codes) -> None:
    """Set ``codes[i, token]``; in the tiles of 16 x 16 that there are, seven times as fast."""
    is_whole = len(lines) == _LINES
    num_tiled = len(codes) // 16 * 16 if is_whole else 0
    for i in range(0, num_tiled, 16):
        source, goal = lines.ctypes.data + i, codes.ctypes.data + i * codes.strides[0]
        transpose_16(source, lines.shape[1], goal, codes.strides[0])
    for i in range(num_tiled, len(codes)):
        for token in range(len(lines)):
            codes[i, token] = lines[token, i]


@njit(nogil=True, cache=True)
def join_codes(
    addresses: Places, lengths: Places, part_scales: Floats, codes: Codes, scales: Floats
) -> None:
    """Put parts together, one after the other, with one scale per channel.

    Parameters
    ----------
    addresses, lengths : int64 [num_parts]
        Where the codes of each part are, int8 [num_heads, dim, length].
    part_scales : float32 [num_parts, num_heads, dim]
    codes : int8 [num_heads, dim, sum of lengths]
    scales : float32 [num_heads, dim]
    """
    num_parts, num_heads, dim = part_scales.shape
    for head in range(num_heads):
        for i in range(dim):
            scales[head, i] = part_scales[:, head, i].max()
    for head in range(num_heads):
        for first in range(0, dim, _JOINED_CHANNELS):
            last, start = min(first + _JOINED_CHANNELS, dim), 0
            for part in range(num_parts):
                length = lengths[part]
                for i in range(first, last):
                    source = addresses[part] + (head * dim + i) * length
                    own, scale = part_scales[part, head, i], scales[head, i]
                    ratio = own / scale if scale > 0 else F32(0)
                    _rescale(source, ratio, codes[head, i, start : start + length])
                start += length


@njit(nogil=True, cache=True)
def _rescale(source: int, ratio: np.float32, codes: Codes) -> None:
    for token in range(len(codes)):
        number = F32(np.int8(load_u8(source, token))) * ratio
        codes[token] = np.int8(as_bits(number + _WHOLE))
