"""Rows of codes as float32, 16 channels at once. Needs numba.

Functions here are for use inside of compiled kernels, and take addresses. Each comes in two kinds:
for keys, with a factor per channel, and for values, with one for each so many channels.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I8, _I32, _F32 = ir.IntType(8), ir.IntType(32), ir.FloatType()
_BYTES, _INTS, _FLOATS = (ir.VectorType(kind, 16) for kind in (_I8, _I32, _F32))
_LANES = 16


def _make_unpack(num_bits: int, group: int | None) -> Any:
    """Return a kernel that sets ``zero + scale * code`` for all channels of a row.

    ``codes`` points to ``16 * num_steps`` bytes, packed as in ``kernels.kivi``; ``scales`` and
    ``zeros`` to float32 for every channel, or for each ``group`` of them. Products and sums are
    rounded one after the other, as elsewhere.
    """

    @intrinsic
    def unpack(
        typing_context: Any, codes: Any, num_steps: Any, scales: Any, zeros: Any, out: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, num_steps, scales, zeros, out = arguments
            with cgutils.for_range(builder, num_steps) as loop:
                packed = builder.zext(_load_bytes(builder, codes, loop.index), _INTS)
                for run in range(8 // num_bits):
                    shifted = builder.lshr(packed, _INTS([run * num_bits] * _LANES))
                    code = builder.and_(shifted, _INTS([(1 << num_bits) - 1] * _LANES))
                    step = builder.add(loop.index, builder.mul(num_steps, num_steps.type(run)))
                    scale = _factors(builder, scales, step, group)
                    number = builder.fmul(scale, builder.uitofp(code, _FLOATS))
                    number = builder.fadd(_factors(builder, zeros, step, group), number)
                    _store(builder, number, out, step)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), generate

    return unpack


def _make_scale(group: int | None) -> Any:
    """Return a kernel that sets ``scale * code`` for rows of ``16 * num_steps`` signed bytes."""

    @intrinsic
    def scale(typing_context: Any, codes: Any, num_steps: Any, scales: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, num_steps, scales, out = arguments
            with cgutils.for_range(builder, num_steps) as loop:
                code = builder.sext(_load_bytes(builder, codes, loop.index), _INTS)
                factors = _factors(builder, scales, loop.index, group)
                number = builder.fmul(builder.sitofp(code, _FLOATS), factors)
                _store(builder, number, out, loop.index)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), generate

    return scale


def _load_bytes(builder: Any, address: Any, step: Any) -> Any:
    loaded = builder.load(builder.gep(builder.inttoptr(address, _BYTES.as_pointer()), [step]))
    loaded.align = 1
    return loaded


def _factors(builder: Any, address: Any, step: Any, group: int | None) -> Any:
    """Return the factors of 16 channels."""
    if group is None:
        floats = builder.gep(builder.inttoptr(address, _FLOATS.as_pointer()), [step])
        loaded = builder.load(floats)
        loaded.align = 4
        return loaded
    own = builder.udiv(step, step.type(group // _LANES))
    single = builder.load(builder.gep(builder.inttoptr(address, _F32.as_pointer()), [own]))
    empty = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(empty, single, _I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(_INTS, [0] * _LANES))


def _store(builder: Any, numbers: Any, address: Any, step: Any) -> None:
    target = builder.gep(builder.inttoptr(address, _FLOATS.as_pointer()), [step])
    builder.store(numbers, target).align = 4


unpack_keys_4, unpack_values_4 = _make_unpack(4, None), _make_unpack(4, 32)
unpack_keys_2, unpack_values_2 = _make_unpack(2, None), _make_unpack(2, 32)
scale_keys, scale_values = _make_scale(None), _make_scale(64)
