"""Inner products and sums of rows in half precision, 16 numbers at once. Needs numba.

Functions here are for use inside of compiled kernels, and take addresses; rows have a multiple of
16 numbers. Each exists for four queries or one, and for rows of float32, bfloat16 and float16.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.kernels.cpu_intrinsics import call_llvm

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS = ir.VectorType(_F32, 16)

FLOAT, BRAIN, HALF = 0, 1, 2
"""Codes of the dtypes of rows: float32, bfloat16, float16."""


def _make_scores(kind: int, num_queries: int) -> Any:
    """Return a kernel of inner products of one row with float32 queries.

    ``row`` points to ``16 * num_steps`` numbers, ``queries`` to as many float32 for each query,
    ``step`` apart; each product goes to a float32, ``out_step`` apart from ``out`` on.
    """

    @intrinsic
    def scores(
        typing_context: Any,
        row: Any,
        queries: Any,
        step: Any,
        num_steps: Any,
        out: Any,
        out_step: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row, queries, step, num_steps, out, out_step = arguments
            zero = ir.Constant(_FLOATS, [0.0] * 16)
            sums = [cgutils.alloca_once_value(builder, zero) for _ in range(num_queries)]
            with cgutils.for_range(builder, num_steps) as loop:
                numbers = _load_row(builder, kind, row, loop.index)
                place = builder.mul(loop.index, _I64(16))
                for query, total in enumerate(sums):
                    index = builder.add(place, builder.mul(step, _I64(query)))
                    factors = _load(builder, _floats_at(builder, queries, index))
                    _add_product(builder, total, numbers, factors)
            for query, total in enumerate(sums):
                product = _sum(builder, builder.load(total))
                target = builder.inttoptr(out, _F32.as_pointer())
                place = builder.mul(out_step, _I64(query))
                builder.store(product, builder.gep(target, [place]))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return scores


def _make_sums(kind: int, num_queries: int) -> Any:
    """Return a kernel that adds rows, weighted.

    ``rows`` points to the int64 addresses of rows of ``16 * num_steps`` numbers, ``weights`` to
    float32 ``[num_rows]`` for each query, ``step`` apart; they are added to the float32 at ``out``,
    ``out_step`` apart for each query.
    """

    @intrinsic
    def sums(
        typing_context: Any,
        rows: Any,
        num_rows: Any,
        offset: Any,
        weights: Any,
        step: Any,
        out: Any,
        out_step: Any,
        num_steps: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, num_rows, offset, weights, step, out, out_step, num_steps = arguments
            places = builder.inttoptr(rows, _I64.as_pointer())
            factors = builder.inttoptr(weights, _F32.as_pointer())
            with cgutils.for_range(builder, num_steps) as columns:
                goals = []
                for query in range(num_queries):
                    index = builder.mul(columns.index, _I64(16))
                    index = builder.add(index, builder.mul(out_step, _I64(query)))
                    goals.append(_floats_at(builder, out, index))
                totals = [
                    cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * 16))
                    for _ in goals
                ]
                for goal, total in zip(goals, totals, strict=True):
                    builder.store(_load(builder, goal), total)
                with cgutils.for_range(builder, num_rows) as loop:
                    address = builder.add(builder.load(builder.gep(places, [loop.index])), offset)
                    numbers = _load_row(builder, kind, address, columns.index)
                    for query, total in enumerate(totals):
                        index = builder.add(loop.index, builder.mul(step, _I64(query)))
                        weight = builder.load(builder.gep(factors, [index]))
                        _add_product(builder, total, numbers, _repeat(builder, weight))
                for goal, total in zip(goals, totals, strict=True):
                    builder.store(builder.load(total), goal).align = 4
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return sums


def _load_row(builder: Any, kind: int, row: Any, step: Any) -> Any:
    """Return 16 numbers of a row as float32."""
    item = _F32 if kind == FLOAT else (_I16 if kind == BRAIN else ir.HalfType())
    pointer = builder.inttoptr(row, ir.VectorType(item, 16).as_pointer())
    numbers = builder.load(builder.gep(pointer, [step]))
    numbers.align = 2
    if kind == BRAIN:
        lanes = ir.VectorType(_I32, 16)
        wide = builder.shl(builder.zext(numbers, lanes), ir.Constant(lanes, [16] * 16))
        return builder.bitcast(wide, _FLOATS)
    return numbers if kind == FLOAT else builder.fpext(numbers, _FLOATS)


def _add_product(builder: Any, total: Any, left: Any, right: Any) -> None:
    after = call_llvm(builder, "llvm.fma.v16f32", _FLOATS, left, right, builder.load(total))
    builder.store(after, total)


def _sum(builder: Any, numbers: Any) -> Any:
    """Return the sum of 16 numbers, halves first."""
    size, empty = 16, ir.Constant(_FLOATS, ir.Undefined)
    while size > 1:
        size //= 2
        kind = ir.VectorType(_I32, size)
        first, second = (
            builder.shuffle_vector(
                numbers, empty, ir.Constant(kind, list(range(start, start + size)))
            )
            for start in (0, size)
        )
        numbers = builder.fadd(first, second)
        empty = ir.Constant(ir.VectorType(_F32, size), ir.Undefined)
    return builder.extract_element(numbers, _I32(0))


def _floats_at(builder: Any, address: Any, index: Any) -> Any:
    """Return a pointer to 16 floats, which need not be aligned."""
    own = builder.gep(builder.inttoptr(address, _F32.as_pointer()), [index])
    return builder.bitcast(own, _FLOATS.as_pointer())


def _load(builder: Any, pointer: Any) -> Any:
    loaded = builder.load(pointer)
    loaded.align = 4
    return loaded


def _repeat(builder: Any, number: Any) -> Any:
    empty = ir.Constant(_FLOATS, ir.Undefined)
    single = builder.insert_element(empty, number, _I32(0))
    zero = ir.Constant(ir.VectorType(_I32, 16), [0] * 16)
    return builder.shuffle_vector(single, empty, zero)


float_scores_4, float_scores_1 = _make_scores(FLOAT, 4), _make_scores(FLOAT, 1)
brain_scores_4, brain_scores_1 = _make_scores(BRAIN, 4), _make_scores(BRAIN, 1)
half_scores_4, half_scores_1 = _make_scores(HALF, 4), _make_scores(HALF, 1)
float_sums_4, float_sums_1 = _make_sums(FLOAT, 4), _make_sums(FLOAT, 1)
brain_sums_4, brain_sums_1 = _make_sums(BRAIN, 4), _make_sums(BRAIN, 1)
half_sums_4, half_sums_1 = _make_sums(HALF, 4), _make_sums(HALF, 1)
