"""``kivi4`` and ``kivi2``: keys by channel, values by token, asymmetric, in 4 or 2 bits.

``kernels.kivi`` has the numbers. Every unit of a shape becomes equally many bytes:

==============  ====================================================================================
bytes           content
==============  ====================================================================================
1               mode, 1
1               zero
2               int16, the shift: elements were divided by two to its power
12              zero; so that what follows, and with whole groups the codes, begin at a multiple of
                16 of the payload
2 per group     float16, scales of keys ``[token groups, key_dim]``
2 per group     zeros of keys
2 per group     scales of values ``[num_tokens, channel groups]``
2 per group     zeros of values
the rest        codes ``[num_tokens, bytes of a key and of its value]``
==============  ====================================================================================

Notes
-----
Liu et al., KIVI (arXiv:2402.02750). Unlike there, the newest tokens are not kept out: units are of
full chunks, the window stays on the device. Zeros are rounded down and scales up, a shift keeps
them inside of float16, and elements that are not finite come back.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offload.errors import CorruptChunk
from offload.kernels.kivi import GROUP, KEYS, VALUES, Bits, Kivi, dequantise, quantise
from offload.tiers.codec_batch import Kernel, decode_units, encode_units, find_kernel
from offload.tiers.codec_payload import (
    FLOATS,
    Bytes,
    check_scales,
    check_shift,
    check_size,
    check_unit,
    choose_shift,
    finite_peak,
    scale_shapes,
    scaled,
    store,
)
from offload.tiers.codecs import Unit

_HEADER = struct.Struct("<BBh12x")
_MODE = 1


class Parsed(NamedTuple):
    """What a payload holds; an element is to be multiplied with two to the power of ``shift``."""

    keys: Kivi
    values: Kivi
    shift: int


@dataclass(frozen=True)
class KiviCodec:
    """Encodes units of floats at a fixed rate.

    Parameters
    ----------
    num_bits : {4, 2}
    is_compiled : bool
        Whether to use kernels, where numba is installed; results do not differ.
    """

    num_bits: Bits
    is_compiled: bool = True
    is_lossless = False

    @property
    def name(self) -> str:
        """``kivi4`` or ``kivi2``."""
        return f"kivi{self.num_bits}"

    @property
    def number(self) -> int:
        """4 or 5."""
        return {4: 4, 2: 5}[self.num_bits]

    def max_bytes(self, unit: Unit) -> int:  # noqa: D102 - docstring inherited
        check_unit(self.name, unit, FLOATS)
        return _HEADER.size + sum(_sizes(unit, self.num_bits))

    def encode(self, rows: Tensor, unit: Unit) -> list[bytes]:  # noqa: D102 - docstring inherited
        size, encode = self.max_bytes(unit), partial(self._encode, unit)
        return encode_units(self._kernel("encode"), encode, rows, unit, size)

    def decode(  # noqa: D102 - docstring inherited
        self, payloads: Sequence[memoryview], unit: Unit, out: Tensor
    ) -> None:
        size, decode = self.max_bytes(unit), partial(self._decode, unit)
        decode_units(self.name, self._kernel("decode"), decode, payloads, unit, out, size)

    def parse(self, payload: Bytes, unit: Unit) -> Parsed:
        """Return what a payload holds, which is what ``attend_kivi`` attends to.

        Raises
        ------
        CorruptChunk
            It is nothing that ``encode`` gives.
        """
        sizes = _sizes(unit, self.num_bits)
        check_size(self.name, payload, _HEADER.size + sum(sizes))
        mode, zero, shift = _HEADER.unpack_from(payload.data)
        if mode != _MODE or zero or payload[4 : _HEADER.size].any():
            raise CorruptChunk(f"{self.name}: a payload that begins with {payload[:16].tolist()}")
        check_shift(self.name, shift)
        parts = np.split(payload[_HEADER.size :].copy(), np.cumsum(sizes)[:-1])
        scales = [torch.from_numpy(part.view(np.float16)) for part in parts[:4]]
        for part in scales:
            check_scales(self.name, part)
        of_keys, of_values = scale_shapes(unit, GROUP)
        codes = torch.from_numpy(parts[4]).view(unit.num_tokens, -1)
        codes, value_codes = codes.split(list(_widths(unit, self.num_bits)), 1)
        return Parsed(
            Kivi(codes, *(part.view(of_keys) for part in scales[:2])),
            Kivi(value_codes, *(part.view(of_values) for part in scales[2:])),
            shift,
        )

    def _encode(self, unit: Unit, rows: Tensor) -> bytes:
        shift = choose_shift(finite_peak(rows))
        keys, values = scaled(rows, -shift).split([unit.key_dim, unit.value_dim], 1)
        key = quantise(keys, self.num_bits, KEYS)
        value = quantise(values, self.num_bits, VALUES)
        codes = torch.cat([key.codes, value.codes], 1)
        parts = (key.scales, key.zeros, value.scales, value.zeros, codes)
        header = _HEADER.pack(_MODE, 0, shift)
        return header + b"".join(part.numpy().tobytes() for part in parts)

    def _decode(self, unit: Unit, payload: Bytes, rows: Tensor) -> None:
        keys, values, shift = self.parse(payload, unit)
        parts = (
            dequantise(keys, self.num_bits, KEYS, unit.key_dim),
            dequantise(values, self.num_bits, VALUES, unit.value_dim),
        )
        store(torch.cat(parts, 1), rows, shift)

    def _kernel(self, function: str) -> Kernel | None:
        return find_kernel("cpu_codec_kivi", function, self.num_bits) if self.is_compiled else None


def _sizes(unit: Unit, num_bits: Bits) -> tuple[int, ...]:
    """Return the bytes of each part after the header."""
    keys, values = (2 * math.prod(shape) for shape in scale_shapes(unit, GROUP))
    codes = unit.num_tokens * sum(_widths(unit, num_bits))
    return (keys, keys, values, values, codes)


def _widths(unit: Unit, num_bits: Bits) -> tuple[int, int]:
    """Return the bytes of the codes of a key and of a value."""
    return -(-unit.key_dim * num_bits // 8), -(-unit.value_dim * num_bits // 8)
