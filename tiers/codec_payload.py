"""What codecs share: units they refuse, payloads they do not know, and the range of float16."""

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.codecs import Unit

Bytes = NDArray[np.uint8]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What lossy codecs encode."""

_ZSTD_LEVEL = 1
"""Higher ones take longer and find no more in exponents and codes."""

GAIN = 0.92
"""Of the bytes before zstd; with more left, its time is not worth it and they stay as they are."""

_LEAST_PEAK, _MOST_PEAK = 2.0**-6, 2.0**15
"""Largest elements of units whose scales float16 holds as they are, to 11 bits."""

_PEAK_EXPONENT = 15
_MOST_SHIFT = 256


def check_unit(codec: str, unit: Unit, dtypes: Collection[torch.dtype] | None = None) -> None:
    """Raise ConfigError if a unit has no elements, or is of a dtype that a codec does not encode.

    Parameters
    ----------
    codec : str
        Its name, for the message.
    unit : Unit
    dtypes : collection of torch.dtype, optional
        Default: all.
    """
    if unit.num_bytes < 1 or min(unit.num_tokens, unit.key_dim, unit.value_dim) < 0:
        raise ConfigError(
            f"{codec} encodes no units of {unit.num_tokens} tokens, keys of {unit.key_dim} and "
            f"values of {unit.value_dim} channels"
        )
    if dtypes is not None and unit.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ConfigError(f"{codec} encodes {names}, not {str(unit.dtype).removeprefix('torch.')}")


def decode_each(
    codec: str,
    decode: Callable[[Bytes, Tensor], None],
    payloads: Sequence[memoryview],
    out: Tensor,
) -> None:
    """Decode payloads one after the other, each into its contiguous rows.

    Parameters
    ----------
    codec : str
        Its name, for messages.
    decode : callable
        Called with the bytes of a payload, of which there is at least one, and its rows.
    payloads : sequence of memoryview
    out : Tensor, shape (num_units, num_tokens, row_dim)
    """
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    for payload, rows in zip(payloads, target, strict=True):
        if not payload.nbytes:
            raise CorruptChunk(f"{codec}: a payload of 0 bytes")
        decode(np.frombuffer(payload, np.uint8), rows)
    if target is not out:
        out.copy_(target)


def check_size(codec: str, payload: Bytes, num_bytes: int) -> None:
    """Raise CorruptChunk if a payload does not have so many bytes."""
    if len(payload) != num_bytes:
        raise CorruptChunk(f"{codec}: a payload of {len(payload)} bytes, not {num_bytes}")


def new_compressor() -> zstandard.ZstdCompressor:
    """Return a compressor whose frames ``decompress`` takes; for one thread."""
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True)


def decompress(codec: str, frame: Bytes, num_bytes: int) -> Bytes:
    """Return what a zstd frame holds.

    Raises
    ------
    CorruptChunk
        It is no frame of so many bytes, or is followed by others.
    """
    try:
        stated = zstandard.frame_content_size(frame.data)
        # Checked first: the decompressor makes room for whatever the frame says.
        if stated != num_bytes:
            raise CorruptChunk(f"{codec}: a frame of {stated} bytes, not {num_bytes}")
        found = zstandard.ZstdDecompressor().decompress(frame.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptChunk(f"{codec}: {len(frame)} bytes are no zstd frame: {error}") from error
    return np.frombuffer(found, np.uint8)


def choose_shift(peak: float) -> int:
    """Return the power of two to divide a unit by, so that float16 holds its scales.

    Parameters
    ----------
    peak : float
        Largest absolute value of its finite elements. Nearly all units have one that needs nothing.
    """
    if peak == 0 or _LEAST_PEAK <= peak < _MOST_PEAK:
        return 0
    return math.frexp(peak)[1] - _PEAK_EXPONENT


def check_shift(codec: str, shift: int) -> None:
    """Raise CorruptChunk if ``choose_shift`` never returns this."""
    if abs(shift) > _MOST_SHIFT:
        raise CorruptChunk(f"{codec}: elements times 2**{shift}, at most 2**{_MOST_SHIFT}")


def scale_shapes(unit: Unit, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of the scales of keys and of values, in groups of ``size`` elements."""
    token_groups, channel_groups = -(-unit.num_tokens // size), -(-unit.value_dim // size)
    return (token_groups, unit.key_dim), (unit.num_tokens, channel_groups)


def check_scales(codec: str, scales: Tensor) -> None:
    """Raise CorruptChunk if any scale or zero, float16, is not finite."""
    is_finite = scales.isfinite()
    if not is_finite.all():
        number = int(is_finite.logical_not().nonzero()[0])
        raise CorruptChunk(f"{codec}: number {number} of {len(scales)} scales is {scales[number]}")


def scaled(rows: Tensor, shift: int) -> Tensor:
    """Return float32 rows times two to the power of ``shift``, however large that is."""
    if not shift:
        return rows
    with np.errstate(all="ignore"):  # what is not finite, or vanishes next to the largest
        return torch.from_numpy(np.ldexp(rows.numpy(), shift))


def finite_peak(rows: Tensor) -> float:
    """Return the largest absolute value of the finite elements, 0 if there are none."""
    return rows.abs().where(rows.isfinite(), 0.0).amax().item()


def store(rows: Tensor, out: Tensor, shift: int) -> None:
    """Round decoded rows to the dtype of ``out``; what is finite stays so.

    Parameters
    ----------
    rows : Tensor, shape (num_tokens, row_dim), float32
    out : Tensor, same shape
    shift : int
        Rows are multiplied with two to its power.
    """
    if shift:
        limit = torch.finfo(out.dtype).max
        wide = rows.double() * 2.0**shift
        # Half a scale above the largest element may be beyond the dtype.
        rows = wide.where(wide.isinf(), wide.clamp(-limit, limit))
    out.copy_(rows)
