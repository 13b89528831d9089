"""What numba lacks: bits as numbers, half precision, memory by address.

Needs numba. Functions here are for use inside of compiled kernels.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_I8, _I16, _I32 = (ir.IntType(bits) for bits in (8, 16, 32))


def call_llvm(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call a function of LLVM's own while code is generated."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _intrinsic(function: Any) -> Any:
    """Make an intrinsic, whose arguments are not those that type checkers see."""
    return intrinsic(function)


@_intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:
    """Return the float32 with the bits of a uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@_intrinsic
def as_bits(typing_context: Any, number: Any) -> Any:
    """Return the bits of a float32 as a uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.uint32(types.float32), generate


@_intrinsic
def from_half(typing_context: Any, bits: Any) -> Any:
    """Return the float32 of the bits of a float16, a uint16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@_intrinsic
def to_half(typing_context: Any, number: Any) -> Any:
    """Return the bits, a uint16, of a float32 rounded to float16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), _I16)

    return types.uint16(types.float32), generate


@_intrinsic
def widen(typing_context: Any, number: Any) -> Any:
    """Return a float32, the bits of a bfloat16 (uint16) or float16 (int16), or a code as float."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (bits,), single = arguments, ir.FloatType()
        if number == types.uint16:
            wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.IntType(32)(16))
            return builder.bitcast(wide, single)
        if number == types.int16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), single)
        if number == types.uint8:
            return builder.sitofp(builder.zext(bits, ir.IntType(32)), single)
        return bits

    return types.float32(number), generate


@_intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Begin to load the cache line at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I8.as_pointer())
        call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, _I32(0), _I32(3), _I32(1))
        return context.get_dummy_value()

    return types.void(types.intp), generate


@_intrinsic
def pointer_to(typing_context: Any, address: Any) -> Any:
    """Return the memory at an address as ``numba.carray`` wants it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], _I8.as_pointer())

    return types.voidptr(types.int64), generate


@_intrinsic
def load_u8(typing_context: Any, address: Any, index: Any) -> Any:
    """Return byte ``index`` of the memory at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I8.as_pointer())
        return builder.load(builder.gep(pointer, [arguments[1]]))

    return types.uint8(types.int64, types.int64), generate


@njit(inline="always")
def from_brain(bits: np.uint16) -> np.float32:
    """Return the float32 of the bits of a bfloat16."""
    return as_float(np.uint32(bits) << np.uint32(16))


@njit(inline="always")
def exp(number: np.float32) -> np.float32:
    """Return e to the power of a float32, to 4e-6, on all lanes at once, unlike libm's.

    The least result is 2**-100, and the greatest 2**127.
    """
    power = min(max(number * np.float32(1.4426950408889634), np.float32(-100.0)), np.float32(127.0))
    whole = np.floor(power + np.float32(0.5))
    part = power - whole
    value = np.float32(1.5353362e-4)
    value = value * part + np.float32(1.3398874e-3)
    value = value * part + np.float32(9.6184370e-3)
    value = value * part + np.float32(5.5503324e-2)
    value = value * part + np.float32(2.4022648e-1)
    value = value * part + np.float32(6.9314720e-1)
    value = value * part + np.float32(1.0)
    return as_float(as_bits(value) + (np.uint32(np.int32(whole)) << np.uint32(23)))


@njit(inline="always")
def sortable(number: np.float32) -> np.int32:
    """Return an integer in the order of floats, whose maximum all lanes can find at once."""
    bits = np.int32(as_bits(number))
    return bits ^ (bits >> np.int32(31) & np.int32(0x7FFFFFFF))


@njit(inline="always")
def unsortable(number: np.int32) -> np.float32:
    """Return the float of ``sortable``."""
    return as_float(np.uint32(number ^ (number >> np.int32(31) & np.int32(0x7FFFFFFF))))
