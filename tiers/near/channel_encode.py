"""Chunks as blocks in memory, of one chunk each."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from offload.kernels.sparf import encode_channels
from offload.tiers.near.channel_block import Block, Floats, Lane

_NO_CHECKSUMS = np.empty((0, 0), np.uint64)


def encode_chunks(
    numbers: Iterator[int],
    slots: Sequence[int],
    lanes: Sequence[Lane],
    keys: Tensor,
    value_sums: Floats,
) -> list[Block]:
    """Return chunks by channel, in int8.

    One scale for each chunk, head and channel: a chunk can then be let go, or joined with others,
    without touching the rest of its tail.

    Parameters
    ----------
    numbers : iterator of int
        For the blocks.
    slots, lanes : sequences of length n, at least 1
    keys : Tensor, shape (n, num_kv_heads, chunk_tokens, key_dim)
    value_sums : ndarray, float32 [n, num_kv_heads, value_dim]
    """
    codes, scales = encode_channels(keys.flatten(0, 1))
    codes = codes.reshape(*keys.shape[:2], *codes.shape[1:])
    scales = scales.reshape(codes.shape[:3])
    means = value_sums / np.float32(keys.shape[2])
    blocks = []
    for index, (slot, lane) in enumerate(zip(slots, lanes, strict=True)):
        own = codes[index].copy()  # a view would keep the codes of all the others
        block = Block(
            next(numbers),
            lane,
            (int(slot),),
            scales[index].copy(),
            means[index].copy(),
            own.ctypes.data,
            _NO_CHECKSUMS,
            own,
        )
        blocks.append(block)
    return blocks
