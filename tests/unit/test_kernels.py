"""Partial attention and merge: the fast path, the reference, and a dense oracle in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from offload.kernels import dispatch, reference
from offload.kernels.reference import empty_partial, gather_chunks, merge, sink_partial
from offload.tiers.pool import grid_view
from offload.types import ChunkLayout, Partial

# Rounding of the inputs is shared with the oracle; what is left is that of the products. The CPU
# kernel keeps probabilities in the dtype of the query, which costs half-precision digits.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One attention problem; the keys come in ``num_chunks`` chunks of ``chunk_tokens``."""

    dtype: torch.dtype = torch.float32
    batch: int = 2
    num_kv_heads: int = 2
    group: int = 2
    num_queries: int = 3
    num_chunks: int = 2
    chunk_tokens: int = 8
    key_dim: int = 16
    value_dim: int = 16
    bias: str = "none"
    softcap: float | None = None
    offset: int | None = None
    window: int | None = None

    @property
    def num_keys(self) -> int:
        return self.num_chunks * self.chunk_tokens


@dataclass(frozen=True, slots=True)
class Inputs:
    query: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor | None


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_bias(case: Case) -> Tensor | None:
    heads, keys = case.num_kv_heads * case.group, case.num_keys
    if case.bias == "none":
        return None
    if case.bias == "full":
        bias = draw(case.batch, heads, case.num_queries, keys, seed=4)
        return bias.masked_fill(bias > 1, -math.inf)
    if case.bias == "shared":
        return draw(1, 1, case.num_queries, keys, seed=5)
    bias = torch.zeros(case.batch, 1, 1, keys)
    hidden = keys if case.bias == "blind_row" else keys // 2 + 1
    bias[0, ..., :hidden] = -math.inf
    return bias


def make_inputs(case: Case) -> Inputs:
    """Draw the inputs; the chunks are a strided view of a pool with slots between them."""
    layout = ChunkLayout(
        case.num_kv_heads, case.chunk_tokens, case.key_dim, case.value_dim, case.dtype
    )
    num_slots = 2 * case.batch * case.num_chunks + 1
    pool = torch.zeros(num_slots, layout.slot_bytes, dtype=torch.uint8)
    content = draw(num_slots, *layout.shape, seed=1, dtype=case.dtype)
    pool[:, : layout.chunk_bytes] = content.flatten(1).view(torch.uint8)
    rows = grid_view(pool, 1, (1, 2 * case.batch), (case.batch, case.num_chunks), layout)
    query = draw(
        case.batch,
        case.num_kv_heads * case.group,
        case.num_queries,
        case.key_dim,
        seed=2,
        dtype=case.dtype,
    )
    return Inputs(query, rows[..., : case.key_dim], rows[..., case.key_dim :], make_bias(case))


def dense(case: Case, inputs: Inputs, scale: float) -> Partial:
    """Attend in float64, one softmax over a written-out score matrix."""
    keys, values = (
        x.double().transpose(1, 2).flatten(2, 3).repeat_interleave(case.group, 1)
        for x in (inputs.keys, inputs.values)
    )
    scores = inputs.query.double() @ keys.transpose(-1, -2) * scale
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if inputs.bias is not None:
        scores = scores + inputs.bias
    if case.offset is not None:
        query = torch.arange(case.num_queries)[:, None] + case.offset
        key = torch.arange(case.num_keys)
        visible = key <= query
        if case.window is not None:
            visible &= key > query - case.window
        scores = scores.masked_fill(~visible, -math.inf)
    return Partial(scores.softmax(-1).nan_to_num(0.0) @ values, scores.logsumexp(-1))


def check(case: Case, attention: Callable[..., Partial]) -> None:
    """Compare an attention function with the oracle."""
    inputs, scale = make_inputs(case), 0.7 * case.key_dim**-0.5
    found = attention(
        inputs.query,
        inputs.keys,
        inputs.values,
        scale=scale,
        bias=inputs.bias,
        softcap=case.softcap,
        offset=case.offset,
        window=case.window,
    )
    expected = dense(case, inputs, scale)
    limit = TOLERANCE[case.dtype]
    assert found.out.shape == expected.out.shape
    assert found.lse.shape == expected.lse.shape
    torch.testing.assert_close(found.out.double(), expected.out, rtol=limit, atol=limit)
    torch.testing.assert_close(found.lse.double(), expected.lse, rtol=limit, atol=limit)


both = pytest.mark.parametrize(
    "attention",
    [dispatch.partial_attention, reference.partial_attention],
    ids=["dispatch", "reference"],
)


@both
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_attention_of_any_dtype_group_and_head_dim_is_the_dense_one(
    attention: Callable[..., Partial], dtype: torch.dtype, group: int, head_dim: int
) -> None:
    case = Case(dtype=dtype, group=group, key_dim=head_dim, value_dim=head_dim, num_queries=1)
    check(case, attention)


@both
@pytest.mark.parametrize("num_chunks", [1, 2, 5])
@pytest.mark.parametrize("num_queries", [1, 2, 7, 40])
@pytest.mark.parametrize("bias", ["none", "padding", "blind_row", "shared", "full"])
def test_attention_over_any_chunks_queries_and_bias_is_the_dense_one(
    attention: Callable[..., Partial], num_chunks: int, num_queries: int, bias: str
) -> None:
    check(Case(num_chunks=num_chunks, num_queries=num_queries, bias=bias), attention)


@both
@pytest.mark.parametrize("bias", ["none", "padding", "blind_row", "full"])
@pytest.mark.parametrize("window", [None, 1, 5, 12, 100])
@pytest.mark.parametrize("offset", [-20, -6, 0, 3, 15, 40])
def test_attention_with_any_offset_and_window_is_the_dense_one(
    attention: Callable[..., Partial], offset: int, window: int | None, bias: str
) -> None:
    check(Case(num_queries=10, offset=offset, window=window, bias=bias), attention)


@both
@pytest.mark.parametrize("num_keys", [1, 2, 511, 512, 513, 1100])
@pytest.mark.parametrize("bias", ["none", "padding", "blind_row", "full"])
def test_causal_attention_of_a_prompt_to_itself_is_the_dense_one(
    attention: Callable[..., Partial], num_keys: int, bias: str
) -> None:
    case = Case(
        num_queries=num_keys, num_chunks=1, chunk_tokens=num_keys, offset=0, bias=bias, key_dim=8
    )
    check(case, attention)


@both
@pytest.mark.parametrize("offset", [None, 0, 5])
@pytest.mark.parametrize("bias", ["none", "blind_row"])
def test_attention_with_softcap_is_the_dense_one(
    attention: Callable[..., Partial], offset: int | None, bias: str
) -> None:
    check(Case(softcap=0.5, offset=offset, bias=bias), attention)


@both
@pytest.mark.parametrize("value_dim", [1, 24])
def test_attention_with_values_of_another_width_is_the_dense_one(
    attention: Callable[..., Partial], value_dim: int
) -> None:
    check(Case(value_dim=value_dim, bias="padding"), attention)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", ["padding", "blind_row", "full"])
@pytest.mark.parametrize("offset", [None, 0])
def test_attention_with_bias_in_half_precision_is_the_dense_one(
    attention: Callable[..., Partial], dtype: torch.dtype, bias: str, offset: int | None
) -> None:
    check(Case(dtype=dtype, num_queries=16, bias=bias, offset=offset), attention)


@both
def test_attention_with_bias_of_one_batch_row_serves_every_row(
    attention: Callable[..., Partial],
) -> None:
    check(Case(batch=3, num_chunks=3, num_queries=1, bias="shared"), attention)


@both
def test_attention_with_huge_scores_stays_finite(attention: Callable[..., Partial]) -> None:
    inputs = make_inputs(Case())
    found = attention(inputs.query, inputs.keys, inputs.values, scale=1e4)
    assert torch.isfinite(found.out).all()
    assert torch.isfinite(found.lse).all()


@pytest.mark.parametrize("limit", [1, 100, 1000])
def test_reference_in_small_blocks_gives_the_same_answer(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    case = Case(num_queries=9, bias="full", offset=4, window=6)
    monkeypatch.setattr(reference, "_MAX_SCORE_ELEMENTS", limit)
    check(case, reference.partial_attention)


def test_reference_never_holds_more_scores_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(num_queries=50)
    per_query = case.batch * case.num_kv_heads * case.group * case.num_keys
    monkeypatch.setattr(reference, "_MAX_SCORE_ELEMENTS", 7 * per_query)
    seen: list[int] = []
    hidden = reference._hidden

    def spy(rows: slice, *args: int) -> Tensor:
        seen.append(rows.stop - rows.start)
        return hidden(rows, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "_hidden", spy)
    inputs = make_inputs(case)
    reference.partial_attention(inputs.query, inputs.keys, inputs.values, scale=1.0, offset=0)
    assert seen == [7] * 7 + [1]


def split_parts(num_parts: int) -> tuple[list[Partial], Partial]:
    """Attend to each chunk alone, and to all together."""
    case = Case(dtype=torch.float64, num_chunks=num_parts)
    inputs = make_inputs(case)
    parts = [
        reference.partial_attention(
            inputs.query, inputs.keys[:, i : i + 1], inputs.values[:, i : i + 1], scale=1.0
        )
        for i in range(num_parts)
    ]
    return parts, dense(case, inputs, 1.0)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 6])
def test_merge_of_disjoint_parts_is_attention_to_their_union(num_parts: int) -> None:
    parts, expected = split_parts(num_parts)
    torch.testing.assert_close(merge(parts), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_merge_in_any_order_or_nesting_is_the_same(order: tuple[int, ...]) -> None:
    parts, expected = split_parts(3)
    first, second, third = (parts[i] for i in order)
    nested = merge([merge([first, second]), third])
    torch.testing.assert_close(merge([first, second, third]), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nested, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_merge_with_an_empty_part_ignores_it(place: int) -> None:
    parts, expected = split_parts(2)
    parts.insert(place, empty_partial(make_inputs(Case(dtype=torch.float64)).query, 16))
    torch.testing.assert_close(merge(parts), expected, rtol=1e-12, atol=1e-12)


def test_merge_of_empty_parts_is_empty_and_has_no_nan() -> None:
    empty = empty_partial(make_inputs(Case()).query, 16)
    found = merge([empty, empty])
    assert (found.out == 0).all()
    assert (found.lse == -math.inf).all()


def test_merge_of_far_apart_parts_keeps_the_larger_one() -> None:
    parts, _ = split_parts(2)
    far = Partial(parts[1].out, parts[1].lse - 1e30)
    torch.testing.assert_close(merge([parts[0], far]), parts[0])


def test_empty_partial_accumulates_in_float32_or_wider() -> None:
    dtypes = [
        empty_partial(torch.zeros(1, 1, 1, 1, dtype=dtype), 1).out.dtype for dtype in TOLERANCE
    ]
    assert dtypes == [torch.float64, torch.float32, torch.float32, torch.float32]


def test_sinks_are_an_extra_column_of_the_softmax_without_a_value() -> None:
    case = Case(dtype=torch.float64)
    inputs, sinks = make_inputs(case), draw(4, seed=9).double()
    part = reference.partial_attention(inputs.query, inputs.keys, inputs.values, scale=1.0)
    found = merge([part, sink_partial(inputs.query, 16, sinks)])
    keys, values = (
        x.transpose(1, 2).flatten(2, 3).repeat_interleave(2, 1)
        for x in (inputs.keys, inputs.values)
    )
    scores = inputs.query @ keys.transpose(-1, -2)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(found.out, weights @ values, rtol=1e-12, atol=1e-12)


def test_gather_chunks_copies_the_named_slots() -> None:
    pool = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 2, 3, 4)
    gathered = gather_chunks(pool, torch.tensor([[4, 0, 2], [1, 1, 3]]))
    assert gathered.shape == (2, 3, 2, 3, 4)
    assert gathered[..., 0, 0, 0].tolist() == [[4, 0, 2], [1, 1, 3]]
