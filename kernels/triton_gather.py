"""Copy rows from addresses, of device or page-locked host memory, into slots of a device cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.errors import ConfigError
from offload.kernels.triton_launch import on_device

_UNIT_BYTES = 16
_TILE_BYTES = 16 << 10
"""Copied by one program: 8 loads of 16 bytes under way in each of its 128 threads. Over a bus that
answers after 2 µs at 55 GB/s, seven programs are enough to keep it busy."""

_MOST_COLUMN_WORDS = 256
"""Of a row that one program copies: 2 KiB."""


@triton.jit
def _gather_rows(
    addresses: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_words: tl.tensor,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    address = tl.load(addresses + row, mask=row < num_rows, other=0)
    slot = tl.load(slots + row, mask=row < num_rows, other=-1)
    mask = ((address != 0) & (slot >= 0))[:, None] & (word < num_words)[None, :]
    source = tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16)
    words = tl.load(source[:, None] + word[None, :], mask=mask)
    target = out + slot[:, None] * num_words + word[None, :]
    tl.store(target, words, mask=mask)


def gather_rows(addresses: Tensor, slots: Tensor, out: Tensor) -> None:
    """Copy each row to its slot; queued on the current stream.

    Parameters
    ----------
    addresses : Tensor, int64 [num_rows]
        Of the first byte of each row, a multiple of 16, in memory that the device of ``out`` can
        read; 0 for none. Nothing keeps the rows from being freed or changed meanwhile.
    slots : Tensor, int64 [num_rows]
        Where each row goes; negative for nowhere. No slot twice.
    out : Tensor, shape (num_slots, ...), contiguous
        A slot has as many bytes as a row, a multiple of 16.

    Raises
    ------
    ConfigError
        Rows of ``out`` are no multiple of 16 bytes, do not begin at one, or are not contiguous.
    """
    row_bytes = out[0].nbytes
    if row_bytes % _UNIT_BYTES or out.data_ptr() % _UNIT_BYTES or not out.is_contiguous():
        raise ConfigError(
            f"rows are gathered {_UNIT_BYTES} bytes at a time, into contiguous slots: "
            f"got {row_bytes} bytes from {out.data_ptr():#x} on, strides {out.stride()}"
        )
    num_words = row_bytes // torch.int64.itemsize
    words = min(_MOST_COLUMN_WORDS, triton.next_power_of_2(num_words))
    rows = _TILE_BYTES // (words * torch.int64.itemsize)
    grid = (triton.cdiv(len(addresses), rows), triton.cdiv(num_words, words))
    if len(addresses):
        with on_device(out):
            _gather_rows[grid](
                addresses,
                slots,
                out.view(-1).view(torch.int64),
                len(addresses),
                num_words,
                ROWS=rows,
                WORDS=words,
                num_warps=4,
            )
