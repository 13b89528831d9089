"""Units of fixed size encoded and decoded together: compiled where that is possible, else in torch.

A kernel leaves out the units that it is not made for (numbers that are not finite, sizes that
float16 does not hold); a function takes these, and all units where there is no kernel.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.kernels.dispatch import compiled
from offload.tiers.codec_payload import Bytes, check_size
from offload.tiers.codecs import Unit

Kernel = Callable[[Bytes, int, tuple[int, int, int], Bytes, NDArray[np.bool_]], None]
"""Takes sources ``[num_units, bytes]``, the kind of float, the unit's shape, and what it sets: \
targets, and which of them it did."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Those of ``kernels.cpu_products``, which needs numba."""


def find_kernel(module: str, function: str, *leading: int) -> Kernel | None:
    """Return a function of a module of kernels, its leading arguments given; None without numba."""
    fast = compiled(module)
    return None if fast is None else partial(getattr(fast, function), *leading)


def encode_units(
    kernel: Kernel | None,
    encode: Callable[[Tensor], bytes],
    rows: Tensor,
    unit: Unit,
    num_bytes: int,
) -> list[bytes]:
    """Return the payload, of ``num_bytes``, of each unit.

    Parameters
    ----------
    kernel : callable or None
    encode : callable
        Returns the payload of float32 rows ``[num_tokens, row_dim]``.
    rows : Tensor, shape (num_units, num_tokens, row_dim)
    unit : Unit
    num_bytes : int
    """
    if kernel is None:
        return [encode(own.float()) for own in rows]
    payloads = np.empty((len(rows), num_bytes), np.uint8)
    is_done = np.empty(len(rows), np.bool_)
    kernel(_as_bytes(rows, unit), _KINDS[unit.dtype], _shape(unit), payloads, is_done)
    return [
        payload.tobytes() if done else encode(own.float())
        for payload, own, done in zip(payloads, rows, is_done.tolist(), strict=True)
    ]


def decode_units(
    codec: str,
    kernel: Kernel | None,
    decode: Callable[[Bytes, Tensor], None],
    payloads: Sequence[memoryview | Bytes],
    unit: Unit,
    out: Tensor,
    num_bytes: int,
) -> None:
    """Fill ``out`` from payloads.

    Parameters
    ----------
    codec : str
        Its name, for messages.
    kernel : callable or None
    decode : callable
        Sets rows ``[num_tokens, row_dim]`` from a payload.
    payloads : sequence of memoryview or ndarray
    unit : Unit
    out : Tensor, shape (num_units, num_tokens, row_dim)
    num_bytes : int

    Raises
    ------
    CorruptChunk
        A payload has not this number of bytes, or ``decode`` says so.
    """
    packed = np.empty((len(out), num_bytes), np.uint8)
    for own, payload in zip(packed, payloads, strict=True):
        read: Bytes = np.frombuffer(payload, np.uint8)
        check_size(codec, read, num_bytes)
        own[:] = read
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    is_done = np.zeros(len(out), np.bool_)
    if kernel is not None:
        kernel(packed, _KINDS[unit.dtype], _shape(unit), _as_bytes(target, unit), is_done)
    for number in np.flatnonzero(~is_done):
        decode(packed[number], target[number])
    if target is not out:
        out.copy_(target)


def _as_bytes(rows: Tensor, unit: Unit) -> Bytes:
    found: Bytes = rows.view(torch.uint8).numpy().reshape(-1, unit.num_bytes)
    return found


def _shape(unit: Unit) -> tuple[int, int, int]:
    return unit.num_tokens, unit.key_dim, unit.value_dim
