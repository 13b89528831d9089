"""Checksums of many pieces of memory in one call: xxh3_64 of inputs of more than 240 bytes.

Written from the specification of XXH3 (``doc/xxhash_spec.md`` of the xxHash project, version 0.2),
with a seed of zero and the default secret, for little-endian machines. Needs numba.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from offload.kernels.cpu_intrinsics import prefetch

U64 = np.uint64

LEAST_BYTES = 241
"""Shorter inputs have algorithms of their own."""

_I64, _I128 = ir.IntType(64), ir.IntType(128)
_LANES = ir.VectorType(_I64, 8)

_STRIPE_BYTES, _BLOCK_BYTES = 64, 1024
_STRIPE_STEP = 8
"""Bytes of the secret between two stripes."""
_LAST_STRIPE, _SCRAMBLE, _MERGE = 121, 128, 11
"""Where in the secret the key of the last stripe begins, that of a block's end, and the merge's."""

_PRIME = U64(0x9E3779B1)
_LENGTH_PRIME = U64(0x9E3779B185EBCA87)
_MIX_PRIME = U64(0x165667919E3779F9)

_START = np.array(
    [
        *(0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9),
        *(0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1),
    ],
    np.uint64,
)

_SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
        "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
        "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
        "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
        "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
        "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)


def _write_add_stripes(
    typing_context: Any, data: Any, num_stripes: Any, secret: Any, lanes: Any
) -> Any:
    """Add stripes of 64 bytes to the eight uint64 at ``lanes``; all of these are addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, num_stripes, secret, lanes = arguments
        place = builder.inttoptr(lanes, _LANES.as_pointer())
        sums = cgutils.alloca_once_value(builder, _load(builder, lanes))
        low, half = (ir.Constant(_LANES, [number] * 8) for number in (0xFFFFFFFF, 32))
        order = ir.Constant(ir.VectorType(ir.IntType(32), 8), [lane ^ 1 for lane in range(8)])
        with cgutils.for_range(builder, num_stripes) as loop:
            step = builder.mul(loop.index, _I64(_STRIPE_BYTES))
            numbers = _load(builder, builder.add(data, step))
            step = builder.mul(loop.index, _I64(_STRIPE_STEP))
            keyed = builder.xor(numbers, _load(builder, builder.add(secret, step)))
            product = builder.mul(builder.and_(keyed, low), builder.lshr(keyed, half))
            swapped = builder.shuffle_vector(numbers, ir.Constant(_LANES, ir.Undefined), order)
            total = builder.add(builder.load(sums), swapped)
            builder.store(builder.add(total, product), sums)
        builder.store(builder.load(sums), place).align = 8
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


def _load(builder: Any, address: Any) -> Any:
    lanes = builder.load(builder.inttoptr(address, _LANES.as_pointer()))
    lanes.align = 1
    return lanes


def _write_fold(typing_context: Any, left: Any, right: Any) -> Any:
    """Return the exclusive or of both halves of a product of 128 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right = (builder.zext(number, _I128) for number in arguments)
        product = builder.mul(left, right)
        high = builder.trunc(builder.lshr(product, ir.Constant(_I128, 64)), _I64)
        return builder.xor(builder.trunc(product, _I64), high)

    return types.uint64(types.uint64, types.uint64), generate


_add_stripes: Any = intrinsic(_write_add_stripes)
_fold: Any = intrinsic(_write_fold)


@njit(nogil=True, cache=True)
def checksums(addresses: NDArray[np.int64], num_bytes: int) -> NDArray[np.uint64]:
    """Return the xxh3_64 of pieces of memory, as ``kernels.xxh3.checksums`` does.

    Parameters
    ----------
    addresses : int64 [num_pieces]
    num_bytes : int
        Of each piece, at least ``LEAST_BYTES``.

    Returns
    -------
    uint64 [num_pieces]
    """
    found = np.empty(len(addresses), np.uint64)
    lanes = np.empty(8, np.uint64)
    for i in range(len(addresses)):
        after = addresses[min(i + 1, len(addresses) - 1)]
        found[i] = _checksum(addresses[i], after, num_bytes, lanes)
    return found


@njit(nogil=True, cache=True)
def _checksum(address: int, after: int, num_bytes: int, lanes: NDArray[np.uint64]) -> np.uint64:
    """Return the checksum of one piece and begin to load the one after it.

    The processor cannot know where that is: single pages are read from RAM at 8.2 GB/s on one core
    with this, at 6.7 without. ``lanes`` are what the function works in.
    """
    lanes[:] = _START
    secret, own = _SECRET.ctypes.data, lanes.ctypes.data
    keys = _SECRET[_SCRAMBLE:].view(np.uint64)
    start, end = 0, num_bytes - 1
    while start < end - end % _BLOCK_BYTES:
        _load_early(after + start, _BLOCK_BYTES)
        _add_stripes(address + start, _BLOCK_BYTES // _STRIPE_BYTES, secret, own)
        for lane in range(8):
            mixed = lanes[lane] ^ (lanes[lane] >> U64(47)) ^ keys[lane]
            lanes[lane] = mixed * _PRIME
        start += _BLOCK_BYTES
    _load_early(after + start, num_bytes - start)
    _add_stripes(address + start, (end - start) // _STRIPE_BYTES, secret, own)
    _add_stripes(address + num_bytes - _STRIPE_BYTES, 1, secret + _LAST_STRIPE, own)
    return _merge(lanes, num_bytes)


@njit(inline="always")
def _load_early(address: int, num_bytes: int) -> None:
    for offset in range(0, num_bytes, 64):
        prefetch(address + offset)


@njit(nogil=True, cache=True)
def _merge(lanes: NDArray[np.uint64], num_bytes: int) -> np.uint64:
    keys = _SECRET[_MERGE : _MERGE + 64].view(np.uint64)
    total = U64(num_bytes) * _LENGTH_PRIME
    for lane in range(0, 8, 2):
        total += _fold(lanes[lane] ^ keys[lane], lanes[lane + 1] ^ keys[lane + 1])
    total = (total ^ (total >> U64(37))) * _MIX_PRIME
    return total ^ (total >> U64(32))
