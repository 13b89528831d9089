"""Keys and values in 4 or 2 bits, and attention over them; plain torch, the definition.

A channel of keys has a scale and a zero for each 32 tokens, because channels differ in size; a
token's value has them for each 32 channels. The last group may have fewer.

Byte ``i`` of a row of codes holds channels ``i``, ``i + width``, and so on, from its lowest bits
up, ``width`` being the bytes of the row: a kernel unpacks straight runs of channels.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from offload.types import Partial

Bits = Literal[4, 2]
Axis = Literal[-2, -1]

KEYS: Axis = -2
"""Groups run along tokens."""

VALUES: Axis = -1
"""Groups run along channels."""

GROUP = 32

_NOT_FINITE = 3
"""Codes, the highest ones, that a group with such elements keeps for NaN and both infinities."""


class Kivi(NamedTuple):
    """Keys or values; an element is its zero plus its code times its scale.

    Attributes
    ----------
    codes : Tensor, uint8 [..., num_tokens, ceil(dim * num_bits / 8)]
    scales, zeros : Tensor, float16
        Keys: ``[..., ceil(num_tokens / 32), dim]``. Values: ``[..., num_tokens, ceil(dim / 32)]``.
        A scale with a minus sign belongs to a group with elements that are not finite: its highest
        codes are NaN (all bits set), infinity and minus infinity, in this order downwards.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def half_above(numbers: Tensor) -> Tensor:
    """Return the smallest float16 that is not below each number, from 0 to 65,504."""
    near = numbers.to(torch.float16) + 0.0  # a minus sign means something else
    return torch.where(
        near.float() < numbers, (near.view(torch.int16) + 1).view(torch.float16), near
    )


def half_below(numbers: Tensor) -> Tensor:
    """Return the largest float16 that is not above each number, between -65,504 and 65,504."""
    near = numbers.to(torch.float16)
    bits = near.view(torch.int16)
    # Zero comes out of numbers just below zero too, and has no sign to step away from.
    below = torch.where(bits > 0, bits - 1, torch.where(near == 0, -0x7FFF, bits + 1))
    return torch.where(near.float() > numbers, below.to(torch.int16).view(torch.float16), near)


def grouped(rows: Tensor, axis: Axis, size: int = GROUP) -> Tensor:
    """Split an axis into groups, the last one filled up with its last element.

    Parameters
    ----------
    rows : Tensor, shape (..., num_tokens, dim)
    axis : {KEYS, VALUES}
    size : int
        Elements of a group.

    Returns
    -------
    Tensor, shape (..., num_groups, size, dim) or (..., num_tokens, num_groups, size)
        So that ``axis`` is within groups.
    """
    last = rows.shape[axis] - 1
    places = torch.arange(-(-rows.shape[axis] // size) * size, device=rows.device)
    filled: Tensor = rows.index_select(axis, places.clamp_max(last)).unflatten(axis, (-1, size))
    return filled


def spread(groups: Tensor, rows: Tensor, axis: Axis, size: int = GROUP) -> Tensor:
    """Return for each element of ``rows`` what belongs to its group."""
    own: Tensor = groups.repeat_interleave(size, axis).narrow(axis, 0, rows.shape[axis])
    return own


def quantise(rows: Tensor, num_bits: Bits, axis: Axis) -> Kivi:
    """Round rows to codes.

    Parameters
    ----------
    rows : Tensor, shape (..., num_tokens, dim), float32
        Finite elements lie between -32,768 and 32,768; others may be there.
    num_bits : {4, 2}
    axis : {KEYS, VALUES}

    Returns
    -------
    Kivi
        No finite element is off by more than half its scale. Scales are rounded up, zeros down, so
        that rounding them cuts nothing off.
    """
    is_finite = rows.isfinite()
    groups, finite = grouped(rows, axis), grouped(is_finite, axis)
    low = groups.where(finite, torch.inf).amin(axis)
    high = groups.where(finite, -torch.inf).amax(axis)
    is_empty = low > high
    low, high = low.masked_fill(is_empty, 0.0), high.masked_fill(is_empty, 0.0)
    is_marked = ~finite.all(axis)
    most = torch.where(is_marked, (1 << num_bits) - 1 - _NOT_FINITE, (1 << num_bits) - 1)
    # With one code left, for everything finite, it stands for the middle.
    zeros = half_below(torch.where(most == 0, low + (high - low) / 2, low)) + 0.0
    steps = torch.where(most == 0, 0.5, most)
    scales = half_above((high - zeros.float()) / steps)
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)
    offset = rows - spread(zeros.float(), rows, axis)
    codes = (offset * spread(inverse, rows, axis) + 0.5).nan_to_num(0.0).clamp_min(0)
    codes = codes.minimum(spread(most.float(), rows, axis)).to(torch.uint8)
    codes[rows == -torch.inf] = (1 << num_bits) - 3
    codes[rows == torch.inf] = (1 << num_bits) - 2
    codes[rows.isnan()] = (1 << num_bits) - 1
    return Kivi(pack(codes, num_bits), torch.where(is_marked, -scales, scales), zeros)


def dequantise(packed: Kivi, num_bits: Bits, axis: Axis, dim: int) -> Tensor:
    """Return the rows, ``[..., num_tokens, dim]`` in float32."""
    codes = unpack(packed.codes, num_bits, dim)
    scales, zeros = (spread(part.float(), codes, axis) for part in packed[1:])
    rows = zeros + scales.abs() * codes
    top = (1 << num_bits) - 1
    special = torch.tensor([-torch.inf, torch.inf, torch.nan], device=codes.device)
    is_special = scales.signbit() & (codes > top - _NOT_FINITE)
    found = special[(codes.int() - (top - _NOT_FINITE + 1)).clamp_min(0)]
    return torch.where(is_special, found, rows)


def pack(codes: Tensor, num_bits: Bits) -> Tensor:
    """Put ``8 / num_bits`` channels into each byte, as the module says."""
    per_byte = 8 // num_bits
    width = -(-codes.shape[-1] // per_byte)
    wide = torch.nn.functional.pad(codes, (0, width * per_byte - codes.shape[-1]))
    packed = wide[..., :width].clone()
    for number in range(1, per_byte):
        packed |= wide[..., number * width : (number + 1) * width] << number * num_bits
    return packed


def unpack(packed: Tensor, num_bits: Bits, dim: int) -> Tensor:
    """Undo ``pack``: uint8 ``[..., dim]``."""
    mask = (1 << num_bits) - 1
    runs = [packed >> number * num_bits & mask for number in range(8 // num_bits)]
    return torch.cat(runs, -1)[..., :dim]


def attend_kivi(
    query: Tensor, keys: Kivi, values: Kivi, *, num_bits: Bits, value_dim: int, scale: float
) -> Partial:
    """Attend with all queries to all keys of some chunks, without making the keys or values.

    Parameters
    ----------
    query : Tensor, shape (batch, num_heads, num_queries, key_dim)
    keys, values : Kivi, over (batch, num_chunks, num_kv_heads, chunk_tokens, dim)
        Of finite elements. Head ``h`` of the query reads KV head
        ``h // (num_heads // num_kv_heads)``.
    num_bits : {4, 2}
    value_dim : int
    scale : float
        Multiplies the scores.

    Returns
    -------
    Partial

    Notes
    -----
    With ``*`` by channel, a key's score is ``q . (scale * code + zero) = (q * scale) . code + q .
    zero``, and of each channel group of values the sum is that of codes by ``weight * scale``, plus
    that of zeros by weight: products are with codes alone.
    """
    batch, num_heads, num_queries, key_dim = query.shape
    num_chunks, num_kv_heads, chunk_tokens = keys.codes.shape[1:4]
    asked = (query.float() * scale).view(batch, 1, num_kv_heads, -1, key_dim)
    numbers = unpack(keys.codes, num_bits, key_dim).float()
    scores = []
    for number, start in enumerate(range(0, chunk_tokens, GROUP)):
        scales, zeros = (part[..., number, None, :].float() for part in keys[1:])
        own = numbers[..., start : start + GROUP, :]
        scores.append((asked * scales) @ own.mT + (asked * zeros).sum(-1, keepdim=True))
    logits = torch.cat(scores, -1).movedim(1, 3).flatten(3)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.unsqueeze(-1)).exp().unflatten(3, (num_chunks, -1)).movedim(3, 1)
    numbers = unpack(values.codes, num_bits, value_dim).float()
    sums = []
    for number, start in enumerate(range(0, value_dim, GROUP)):
        scales, zeros = (part[..., None, :, number].float() for part in values[1:])
        own = numbers[..., start : start + GROUP]
        sums.append((weights * scales) @ own + (weights * zeros).sum(-1, keepdim=True))
    out = torch.cat(sums, -1).sum(1)
    shape = (batch, num_heads, num_queries)
    return Partial(out.view(*shape, -1), lse.view(shape))
