"""Sums of products of small integers, 16 or more at once, written out for numba. Needs numba.

Functions here are for use inside of compiled kernels, and take addresses. Where the processor has
AVX-512 with VNNI they use it; elsewhere they are plain vector arithmetic.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from offload.kernels.cpu_intrinsics import call_llvm

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_LANES = ir.VectorType(_I32, 16)
_BYTES = ir.VectorType(_I8, 64)
_WORDS = ir.VectorType(_I16, 64)
_PAIRS = ir.VectorType(_I16, 32)

_HAS_DOT, _HAS_PAIRS = (
    bool(llvm.get_host_cpu_features().get(name, False)) for name in ("avx512vnni", "avx512bw")
)
"""Whether one instruction adds products by fours (bytes), and by twos (words)."""


def _make_dots(num_bits: int, num_queries: int) -> Any:
    """Return a kernel of the sums of small unsigned numbers times bytes, for 16 lanes.

    ``codes`` points to ``num_words`` words of 16 x 4 bytes, each byte ``8 / num_bits`` numbers;
    ``factors`` to int8 ``[num_words * 8 / num_bits, num_columns, 4]``. Plane ``k`` of word ``j`` is
    multiplied with row ``j * 8 / num_bits + k``, products are added by fours, and over all rows to
    16 int32 for each query, which lie ``step`` int32 apart from ``out`` on.
    """
    planes = 8 // num_bits

    @intrinsic
    def dots(
        typing_context: Any,
        codes: Any,
        factors: Any,
        num_columns: Any,
        num_words: Any,
        out: Any,
        step: Any,
    ) -> Any:
        signature = types.void(*[types.intp] * 6)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, factors, num_columns, num_words, out, step = arguments
            words = builder.inttoptr(codes, _BYTES.as_pointer())
            rows = builder.inttoptr(factors, _I32.as_pointer())
            sums = [_Sum(builder) for _ in range(num_queries)]
            with cgutils.for_range(builder, num_words) as loop:
                raw = builder.load(builder.gep(words, [loop.index]))
                raw.align = 1
                first = builder.mul(loop.index, _I64(planes))
                for plane in range(planes):
                    numbers = _numbers(builder, raw, plane * num_bits, num_bits)
                    row = builder.mul(builder.add(first, _I64(plane)), num_columns)
                    for query in range(num_queries):
                        factor = builder.load(builder.gep(rows, [builder.add(row, _I64(query))]))
                        factor.align = 1
                        sums[query].add(numbers, _spread(builder, factor))
            target = builder.inttoptr(out, _I32.as_pointer())
            for place, total in enumerate(sums):
                own = builder.gep(target, [builder.mul(step, _I64(place))])
                lanes = builder.bitcast(own, _LANES.as_pointer())
                builder.store(total.lanes(), lanes).align = 4
            return context.get_dummy_value()

        return signature, generate

    return dots


class _Sum:
    """Sums of products in 16 lanes, kept in a register."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        kind = _LANES if _HAS_DOT else _WORDS
        lanes = 16 if _HAS_DOT else 64
        self._place = cgutils.alloca_once_value(builder, ir.Constant(kind, [0] * lanes))

    def add(self, numbers: Any, factors: Any) -> None:
        builder, before = self._builder, self._builder.load(self._place)
        if _HAS_DOT:
            name = "llvm.x86.avx512.vpdpbusd.512"
            after = call_llvm(builder, name, _LANES, before, numbers, factors)
        else:
            product = builder.mul(builder.zext(numbers, _WORDS), builder.sext(factors, _WORDS))
            after = builder.add(before, product)
        builder.store(after, self._place)

    def lanes(self) -> Any:
        builder, total = self._builder, self._builder.load(self._place)
        if _HAS_DOT:
            return total
        parts = []
        for byte in range(4):
            order = ir.Constant(_LANES, [4 * lane + byte for lane in range(16)])
            part = builder.shuffle_vector(total, ir.Constant(_WORDS, ir.Undefined), order)
            parts.append(builder.sext(part, _LANES))
        first, second = builder.add(parts[0], parts[1]), builder.add(parts[2], parts[3])
        return builder.add(first, second)


def _numbers(builder: Any, raw: Any, shift: int, num_bits: int) -> Any:
    """Return the numbers of one plane of 64 bytes."""
    if shift:
        pairs = builder.bitcast(raw, _PAIRS)
        raw = builder.bitcast(builder.lshr(pairs, ir.Constant(_PAIRS, [shift] * 32)), _BYTES)
    return builder.and_(raw, ir.Constant(_BYTES, [(1 << num_bits) - 1] * 64))


def _spread(builder: Any, factor: Any) -> Any:
    """Return four bytes repeated for each lane."""
    empty = ir.Constant(_LANES, ir.Undefined)
    single = builder.insert_element(empty, factor, _I32(0))
    lanes = builder.shuffle_vector(single, empty, ir.Constant(_LANES, [0] * 16))
    return builder.bitcast(lanes, _BYTES)


dots_2_bits_4 = _make_dots(2, 4)
dots_2_bits_1 = _make_dots(2, 1)
dots_1_bit_4 = _make_dots(1, 4)
dots_1_bit_1 = _make_dots(1, 1)
"""For codes of two bits or one, and four queries or one; see ``_make_dots``."""


def _make_sign_sums(num_queries: int) -> Any:
    """Return a kernel that adds the signs of vectors in blocks, weighted with bytes.

    ``signs`` points to the blocks that ``sign_planes`` has, ``numbers`` to the int32 numbers of
    those to add; ``weights`` to int8 ``[num_blocks, 16]`` for each query, ``step`` bytes apart. Of
    the 32 coordinates, what those with a set bit weigh goes to int32 ``[num_queries, 32]``.
    """

    @intrinsic
    def add(
        typing_context: Any,
        signs: Any,
        numbers: Any,
        num_blocks: Any,
        weights: Any,
        step: Any,
        out: Any,
    ) -> Any:
        signature = types.void(*[types.intp] * 6)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            signs, numbers, num_blocks, weights, step, out = arguments
            blocks = builder.inttoptr(signs, _BYTES.as_pointer())
            places = builder.inttoptr(numbers, _I32.as_pointer())
            sums = [_Sum(builder) for _ in range(2 * num_queries)]
            with cgutils.for_range(builder, num_blocks) as loop:
                number = builder.sext(builder.load(builder.gep(places, [loop.index])), _I64)
                raw = builder.load(builder.gep(blocks, [number]))
                raw.align = 1
                planes = [_numbers(builder, raw, plane, 1) for plane in range(8)]
                first = builder.add(weights, builder.mul(loop.index, _I64(16)))
                for query in range(num_queries):
                    own = builder.add(first, builder.mul(step, _I64(query)))
                    quads = builder.inttoptr(own, _I32.as_pointer())
                    for quad in range(4):
                        factor = builder.load(builder.gep(quads, [_I64(quad)]))
                        factor.align = 1
                        spread = _spread(builder, factor)
                        sums[2 * query].add(planes[2 * quad], spread)
                        sums[2 * query + 1].add(planes[2 * quad + 1], spread)
            target = builder.inttoptr(out, _LANES.as_pointer())
            for place, total in enumerate(sums):
                lanes = builder.gep(target, [_I64(place)])
                builder.store(total.lanes(), lanes).align = 4
            return context.get_dummy_value()

        return signature, generate

    return add


sign_sums_4 = _make_sign_sums(4)
sign_sums_1 = _make_sign_sums(1)
"""For four queries, or one; at most 64 blocks, so that sums of 16 bits suffice."""


def _make_row_dots(num_queries: int) -> Any:
    """Return a kernel of inner products of a row of int8 with rows of int16.

    ``row`` points to ``32 * num_steps`` int8, ``queries`` to as many int16 for each query, ``step``
    apart; the products go to int32 ``[num_queries]``.
    """

    @intrinsic
    def dots(
        typing_context: Any, row: Any, queries: Any, step: Any, num_steps: Any, out: Any
    ) -> Any:
        signature = types.void(*[types.intp] * 5)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            row, queries, step, num_steps, out = arguments
            numbers = builder.inttoptr(row, ir.VectorType(_I8, 32).as_pointer())
            pointer = builder.inttoptr(queries, _I16.as_pointer())
            zero = ir.Constant(_LANES, [0] * 16)
            sums = [cgutils.alloca_once_value(builder, zero) for _ in range(num_queries)]
            with cgutils.for_range(builder, num_steps) as loop:
                raw = builder.load(builder.gep(numbers, [loop.index]))
                raw.align = 1
                wide, place = builder.sext(raw, _PAIRS), builder.mul(loop.index, _I64(32))
                for query, total in enumerate(sums):
                    index = builder.add(place, builder.mul(step, _I64(query)))
                    own = builder.bitcast(builder.gep(pointer, [index]), _PAIRS.as_pointer())
                    factors = builder.load(own)
                    factors.align = 2
                    product = _multiply_pairs(builder, wide, factors)
                    builder.store(builder.add(builder.load(total), product), total)
            target = builder.inttoptr(out, _I32.as_pointer())
            for query, total in enumerate(sums):
                name = "llvm.vector.reduce.add.v16i32"
                product = call_llvm(builder, name, _I32, builder.load(total))
                builder.store(product, builder.gep(target, [_I64(query)]))
            return context.get_dummy_value()

        return signature, generate

    return dots


def _multiply_pairs(builder: Any, left: Any, right: Any) -> Any:
    """Multiply 32 int16 and add neighbours, to 16 int32."""
    if _HAS_PAIRS:
        return call_llvm(builder, "llvm.x86.avx512.pmaddw.d.512", _LANES, left, right)
    wide = ir.VectorType(_I32, 32)
    product = builder.mul(builder.sext(left, wide), builder.sext(right, wide))
    orders = [ir.Constant(_LANES, [2 * lane + odd for lane in range(16)]) for odd in range(2)]
    empty = ir.Constant(wide, ir.Undefined)
    return builder.add(*(builder.shuffle_vector(product, empty, order) for order in orders))


row_dots_4, row_dots_1 = _make_row_dots(4), _make_row_dots(1)
