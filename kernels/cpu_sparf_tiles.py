"""Sums and transposes of tiles of int8, whose numbers stay in registers. Needs numba.

Functions here are for use inside of compiled kernels, and take addresses. They are written out
because numba keeps arrays, however small, in memory.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.kernels.cpu_intrinsics import call_llvm

_I8, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_CODES, _NUMBERS = ir.VectorType(_I8, 16), ir.VectorType(_I32, 16)
_FLOATS = ir.VectorType(_F32, 16)

_HALVES = [
    ir.Constant(_NUMBERS, [first + lane // 2 + 16 * (lane % 2) for lane in range(16)])
    for first in (0, 8)
]
"""The orders that take turns with the first halves of two vectors, and with the second halves."""

_AHEAD_BYTES = 256
"""How far ahead of a row's tile it is loaded; a quarter faster than leaving rows that come from RAM
to the processor, which loses track of 32 of them."""


def _make_tile(num_queries: int, num_vectors: int) -> Any:
    """Return a kernel of weighted sums of rows, ``16 * num_vectors`` columns of them.

    ``rows`` points to the int64 addresses of ``num_rows`` rows of int8, of which columns from
    ``offset`` on are wanted; ``weights`` to float32 ``[num_rows]`` for each query, one after the
    other. The sums go to the float32 at ``out``, ``out_step`` apart for each query.
    """

    @intrinsic
    def tile(
        typing_context: Any,
        rows: Any,
        num_rows: Any,
        offset: Any,
        weights: Any,
        out: Any,
        out_step: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, num_rows, offset, weights, out, out_step = arguments
            places = builder.inttoptr(rows, _I64.as_pointer())
            factors = builder.inttoptr(weights, _F32.as_pointer())
            zero = ir.Constant(_FLOATS, [0.0] * 16)
            totals = [
                [cgutils.alloca_once_value(builder, zero) for _ in range(num_vectors)]
                for _ in range(num_queries)
            ]
            with cgutils.for_range(builder, num_rows) as loop:
                address = builder.add(builder.load(builder.gep(places, [loop.index])), offset)
                _load_early(builder, address)
                codes = [_load_codes(builder, address, vector) for vector in range(num_vectors)]
                for query, own in enumerate(totals):
                    index = builder.add(loop.index, builder.mul(num_rows, _I64(query)))
                    weight = _repeat(builder, builder.load(builder.gep(factors, [index])))
                    for total, numbers in zip(own, codes, strict=True):
                        terms = (numbers, weight, builder.load(total))
                        after = call_llvm(builder, "llvm.fma.v16f32", _FLOATS, *terms)
                        builder.store(after, total)
            for query, own in enumerate(totals):
                first = builder.add(out, builder.mul(out_step, _I64(4 * query)))
                goal = builder.inttoptr(first, _FLOATS.as_pointer())
                for vector, total in enumerate(own):
                    lanes = builder.gep(goal, [_I64(vector)])
                    builder.store(builder.load(total), lanes).align = 4
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return tile


def _write_transpose(typing_context: Any, rows: Any, step: Any, out: Any, out_step: Any) -> Any:
    """Transpose 16 rows of 16 int8; rows lie ``step`` and ``out_step`` bytes apart."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, step, out, out_step = arguments

        def at(address: Any, step: Any, row: int) -> Any:
            place = builder.add(address, builder.mul(step, _I64(row)))
            return builder.inttoptr(place, _CODES.as_pointer())

        lines = [builder.load(at(rows, step, row)) for row in range(16)]
        for line in lines:
            line.align = 1
        # Row and column are four bits each: every round moves one bit of the row to the column.
        for _ in range(4):
            pairs = list(zip(lines[:8], lines[8:], strict=True))
            lines = [builder.shuffle_vector(*pair, half) for pair in pairs for half in _HALVES]
        for row, line in enumerate(lines):
            builder.store(line, at(out, out_step, row)).align = 1
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


transpose_16: Any = intrinsic(_write_transpose)


def _load_early(builder: Any, address: Any) -> None:
    ahead = builder.inttoptr(builder.add(address, _I64(_AHEAD_BYTES)), _I8.as_pointer())
    hints = (_I32(0), _I32(3), _I32(1))
    call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), ahead, *hints)


def _load_codes(builder: Any, address: Any, vector: int) -> Any:
    pointer = builder.inttoptr(address, _CODES.as_pointer())
    codes = builder.load(builder.gep(pointer, [_I64(vector)]))
    codes.align = 1
    return builder.sitofp(builder.sext(codes, _NUMBERS), _FLOATS)


def _repeat(builder: Any, number: Any) -> Any:
    empty = ir.Constant(_FLOATS, ir.Undefined)
    single = builder.insert_element(empty, number, _I32(0))
    return builder.shuffle_vector(single, empty, ir.Constant(_NUMBERS, [0] * 16))


tile_4_64, tile_4_16 = _make_tile(4, 4), _make_tile(4, 1)
tile_1_64, tile_1_16 = _make_tile(1, 4), _make_tile(1, 1)
"""For four queries or one, and 64 columns or 16; see ``_make_tile``."""
