"""Rows of keys or values in 8 or 4 bits, symmetric around zero; plain torch, the definition.

Eight bits have one scale per row. Four bits have one scale per group of 32 channels, and two
channels in a byte: the lower half of it is a channel of the first half of the row, the upper half
is the same channel of the second half, so that a kernel unpacks two straight runs of channels.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.errors import ConfigError

Bits = Literal[4, 8]

GROUP_CHANNELS = 32

_LARGEST = {8: 127, 4: 7}
_NIBBLE_ZERO = 8
"""What a half byte holds for the number zero."""


class Quantised(NamedTuple):
    """Rows of numbers; a number times its scale is the element.

    Attributes
    ----------
    numbers : Tensor, int8 [..., dim], or uint8 [..., dim / 2]
        8 bits: -127 to 127. 4 bits: byte ``i`` holds channel ``i`` in its lower half and channel
        ``i + dim / 2`` in its upper half, each as the number plus 8, 1 to 15.
    scales : Tensor, bfloat16 or float16 [..., 1] or [..., num_groups]
        Of the row, or of each 32 of its channels.
    """

    numbers: Tensor
    scales: Tensor

    @property
    def num_bits(self) -> Bits:
        """8 or 4."""
        return 8 if self.numbers.dtype == torch.int8 else 4

    @property
    def dim(self) -> int:
        """Channels of a row."""
        return self.numbers.shape[-1] * (8 // self.num_bits)


def quantise(rows: Tensor, num_bits: Bits, scale_dtype: torch.dtype = torch.bfloat16) -> Quantised:
    """Round rows to the nearest numbers.

    Parameters
    ----------
    rows : Tensor, shape (..., dim)
        Finite.
    num_bits : {4, 8}
    scale_dtype : {torch.bfloat16, torch.float16}
        float16 is the finer one, for elements below 65,504 times the largest number.

    Returns
    -------
    Quantised
        No element is off by more than half its scale, but where rounding the scale itself, by
        2^-9 (bfloat16) or 2^-11 of it, moves the largest elements.

    Raises
    ------
    ConfigError
        An odd ``dim`` in 4 bits.
    """
    dim = rows.shape[-1]
    if num_bits == 4 and dim % 2:
        raise ConfigError(f"rows of {dim} channels cannot be packed two to a byte")
    channels = dim if num_bits == 8 else GROUP_CHANNELS
    wide = pad(rows.float(), (0, -dim % channels)).unflatten(-1, (-1, channels))
    limit = _LARGEST[num_bits]
    scales = (wide.abs().amax(-1) / limit).to(scale_dtype)
    # A scale may round to zero: what is that small is zero then.
    unit = torch.where(scales > 0, scales.float(), torch.inf).unsqueeze(-1)
    numbers = (wide / unit).round().clamp(-limit, limit).flatten(-2)[..., :dim]
    if num_bits == 8:
        return Quantised(numbers.to(torch.int8), scales)
    low, high = (numbers + _NIBBLE_ZERO).to(torch.uint8).chunk(2, -1)
    return Quantised(low | high << 4, scales)


def dequantise(packed: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the rows, ``[..., dim]``, each element rounded once to ``dtype``."""
    numbers = packed.numbers.float()
    if packed.num_bits == 8:
        return (numbers * packed.scales.float()).to(dtype)
    halves = [packed.numbers & 15, packed.numbers >> 4]
    numbers = torch.cat(halves, -1).float() - _NIBBLE_ZERO
    scales = packed.scales.float().repeat_interleave(GROUP_CHANNELS, -1)[..., : packed.dim]
    return (numbers * scales).to(dtype)
