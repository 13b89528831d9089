"""What the launches of Triton kernels have in common: sizes, splits, and the dtype of products.

Needs triton, like every module here whose name begins with ``triton``: none of them may be imported
by a module that is imported without it. With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors.
"""

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

LEAST_DOT = 16
"""Rows of a matrix product, at least."""

_MOST_SPLITS = 64
"""So many partial results one program can merge."""

_PROGRAMS_PER_PROCESSOR = 2
"""Of 64 keys and three stages, 96 KiB of shared memory each: two fit side by side."""

_INTERPRETED_PROCESSORS = 4
"""As if there were so many: the interpreter runs programs one after the other."""

_STAGE_BYTES = 32 << 10
_MOST_STAGED_ROWS = 64
"""Keys and values of one stage of a pipelined loop."""

DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


class Splits(NamedTuple):
    """How the keys of one program are shared among several.

    Attributes
    ----------
    num_splits : int
    split_keys : int
        Of each, a multiple of ``block``; the last may have fewer.
    block : int
        Keys loaded at a time.
    """

    num_splits: int
    split_keys: int
    block: int


def padded(size: int, least: int = LEAST_DOT) -> int:
    """Return the smallest power of two that is neither below ``size`` nor below ``least``."""
    return max(least, 1 << max(0, size - 1).bit_length())


def plan_splits(device: torch.device, num_programs: int, num_keys: int, row_bytes: int) -> Splits:
    """Return how to share keys, so that every processor of the device has something to load.

    Parameters
    ----------
    device : torch.device
    num_programs : int
        Without splits: batch rows times KV heads.
    num_keys, row_bytes : int
        Of each program; the bytes of one key and its value, padded.
    """
    fitting = min(_MOST_STAGED_ROWS, _STAGE_BYTES // row_bytes)
    block = max(LEAST_DOT, 1 << fitting.bit_length() - 1)
    wanted = -(-_PROGRAMS_PER_PROCESSOR * num_processors(device) // num_programs)
    count = max(1, min(wanted, _MOST_SPLITS, -(-num_keys // block)))
    keys = -(-num_keys // (count * block)) * block
    return Splits(max(1, -(-num_keys // max(1, keys))), max(block, keys), block)


def strides_of(chunks: Tensor) -> tuple[int, int, int, int]:
    """Return the strides of batch, chunk, head and token.

    Parameters
    ----------
    chunks : Tensor, shape (batch or 1, num_chunks, num_kv_heads, chunk_tokens, dim)
        With a batch of 1, the chunks are those of every row of the batch.
    """
    batch, chunk, head, token, _ = chunks.stride()
    return (0 if len(chunks) == 1 else batch, chunk, head, token)


def on_device(tensor: Tensor) -> torch.cuda.device_of:
    """Return a context in which kernels are launched where a tensor is."""
    return torch.cuda.device_of(tensor)


def num_processors(device: torch.device) -> int:
    """Return how many programs the device runs at once, if each takes a processor of its own."""
    return _INTERPRETED_PROCESSORS if device.type == "cpu" else _count_processors(device)


@functools.cache
def _count_processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def product_dtype(rows: Tensor) -> tl.dtype:
    """Return what keys and values are multiplied in: their dtype, if the device has products of it.

    The interpreter keeps bfloat16 as its bits and cannot multiply them.
    """
    if knobs.runtime.interpret and rows.dtype == torch.bfloat16:
        return tl.float32
    return DTYPES[rows.dtype]
