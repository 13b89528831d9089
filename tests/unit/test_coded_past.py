"""Attention over codes where they are is attention over what they decode to, whatever is hidden."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offload.coded_past import read_codes
from offload.exact import AttentionCall, PastChunks
from offload.kernels import dispatch
from offload.kernels.reference import merge, partial_attention
from offload.tiers.codec_fixed import FIXED, find_fixed
from offload.tiers.coded import CodedTier
from offload.tiers.pool import as_chunk, page_aligned
from offload.types import ChunkInfo, ChunkLayout, Partial

BATCH, COUNT, SIZE = 2, 5, 64
FIRST_TOKEN = 3 * SIZE
LAYOUTS = {
    "grouped heads": (ChunkLayout(2, SIZE, 64, 64, torch.float32), 8),
    "one head each": (ChunkLayout(3, SIZE, 32, 32, torch.float32), 3),
    "values unlike keys": (ChunkLayout(2, SIZE, 32, 80, torch.float32), 6),
    "two units of a head": (ChunkLayout(2, 2 * SIZE, 48, 16, torch.float32), 10),
    "odd heads": (ChunkLayout(2, SIZE, 13, 29, torch.float32), 4),
}

every_codec = pytest.mark.parametrize("name", FIXED)
every_layout = pytest.mark.parametrize(("layout", "num_heads"), LAYOUTS.values(), ids=list(LAYOUTS))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill_tier(name: str, layout: ChunkLayout, scale: float = 1.0) -> CodedTier:
    """Return a full tier of ``BATCH * COUNT`` chunks."""
    num, codec = BATCH * COUNT, find_fixed(name)
    tier = CodedTier("cpu", capacity_bytes=num * layout.slot_bytes, layout=layout, codec=codec)
    chunks = page_aligned(num * layout.slot_bytes).view(num, -1)
    for i, chunk in enumerate(chunks):
        as_chunk(chunk, layout).copy_(scale * draw(*layout.shape, seed=i))
    infos = [ChunkInfo(i, 0, i * layout.chunk_tokens) for i in range(num)]
    tier.write(tier.allocate(num), infos, list(chunks)).wait()
    return tier


def grid() -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(COUNT) * BATCH + np.arange(BATCH)[:, None]


def parts_of(
    tier: CodedTier, call: AttentionCall, first_query: int
) -> Iterator[PastChunks | Partial]:
    return read_codes(tier, grid(), FIRST_TOKEN, call, first_query)


def attend(tier: CodedTier, call: AttentionCall, first_query: int) -> Partial:
    """Attend to whatever was decoded, and merge."""
    found = [
        part if isinstance(part, Partial) else reference(call, part, tier.layout, first_query)
        for part in parts_of(tier, call, first_query)
    ]
    return merge(found) if len(found) > 1 else found[0]


def reference(
    call: AttentionCall, past: PastChunks, layout: ChunkLayout, first_query: int
) -> Partial:
    """Attend to decoded chunks by the definition."""
    num_keys, bias = past.rows.shape[1] * layout.chunk_tokens, None
    if call.mask is not None:
        part = call.mask[..., past.first_token : past.first_token + num_keys]
        bias = torch.zeros(part.shape).masked_fill(~part, -torch.inf)
        bias = bias[:, None, None] if bias.ndim == 2 else bias
    return partial_attention(
        call.query,
        past.rows[..., : layout.key_dim],
        past.rows[..., layout.key_dim :],
        scale=call.scale,
        bias=bias,
        softcap=call.softcap,
        offset=first_query - past.first_token,
        window=call.window,
    )


def check_equal(found: Partial, expected: Partial) -> None:
    torch.testing.assert_close(found.out, expected.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-5, atol=1e-5)


def plain_call(layout: ChunkLayout, num_heads: int, num_queries: int = 1) -> AttentionCall:
    query = draw(BATCH, num_heads, num_queries, layout.key_dim, seed=99)
    return AttentionCall(query, layout.key_dim**-0.5)


@every_layout
@every_codec
@pytest.mark.parametrize("num_queries", [1, 3])
def test_attention_on_codes_equals_attention_over_the_decoded_chunks(
    name: str, layout: ChunkLayout, num_heads: int, num_queries: int
) -> None:
    tier = fill_tier(name, layout)
    call = plain_call(layout, num_heads, num_queries)
    first_query = FIRST_TOKEN + COUNT * layout.chunk_tokens
    everything = PastChunks(FIRST_TOKEN, tier.decoded(grid()))
    check_equal(attend(tier, call, first_query), reference(call, everything, layout, first_query))


@pytest.mark.skipif(dispatch.compiled("cpu_coded") is None, reason="needs numba")
@every_codec
def test_decoding_step_decodes_nothing_into_memory(name: str) -> None:
    layout, num_heads = LAYOUTS["grouped heads"]
    tier, call = fill_tier(name, layout), plain_call(layout, num_heads)
    parts = list(parts_of(tier, call, FIRST_TOKEN + COUNT * SIZE))
    assert [type(part) for part in parts] == [Partial]


def padding(num_hidden: int) -> Tensor:
    mask = torch.ones(BATCH, FIRST_TOKEN + COUNT * SIZE + 1, dtype=torch.bool)
    mask[1, :num_hidden] = False
    return mask


QUERY_AT = FIRST_TOKEN + COUNT * SIZE
CHANGES: dict[str, tuple[dict[str, Any], list[type]]] = {
    "padding before": ({"mask": padding(FIRST_TOKEN)}, [Partial]),
    "padding": ({"mask": padding(FIRST_TOKEN + 70)}, [PastChunks, Partial]),
    "window": ({"window": 3 * SIZE}, [PastChunks, Partial]),
    "wide window": ({"window": COUNT * SIZE + 1}, [Partial]),
    "softcap": ({"softcap": 2.0}, [PastChunks]),
    "4-D mask": ({"mask": padding(FIRST_TOKEN + 70)[:, None, None]}, [PastChunks, Partial]),
}


@every_codec
@pytest.mark.parametrize(("change", "kinds"), CHANGES.values(), ids=list(CHANGES))
def test_what_a_query_does_not_see_is_hidden_of_codes_as_well(
    name: str, change: dict[str, Any], kinds: list[type]
) -> None:
    layout, num_heads = LAYOUTS["grouped heads"]
    tier = fill_tier(name, layout)
    call = replace(plain_call(layout, num_heads), **change)
    everything = PastChunks(FIRST_TOKEN, tier.decoded(grid()))
    check_equal(attend(tier, call, QUERY_AT), reference(call, everything, layout, QUERY_AT))
    if dispatch.compiled("cpu_coded") is not None:
        assert [type(part) for part in parts_of(tier, call, QUERY_AT)] == kinds


@every_codec
def test_prompt_of_many_queries_is_attended_over_decoded_chunks(name: str) -> None:
    layout, num_heads = LAYOUTS["grouped heads"]
    tier, call = fill_tier(name, layout), plain_call(layout, num_heads, 40)
    parts = list(parts_of(tier, call, QUERY_AT))
    assert [type(part) for part in parts] == [PastChunks]
    everything = PastChunks(FIRST_TOKEN, tier.decoded(grid()))
    check_equal(attend(tier, call, QUERY_AT), reference(call, everything, layout, QUERY_AT))


@every_codec
@pytest.mark.parametrize("scale", [1e-6, 3e5], ids=["small", "large"])
def test_units_that_kernels_leave_to_torch_are_decoded(name: str, scale: float) -> None:
    layout, num_heads = LAYOUTS["grouped heads"]
    tier = fill_tier(name, layout, scale)
    call = replace(plain_call(layout, num_heads), scale=0.1 / scale)
    everything = PastChunks(FIRST_TOKEN, tier.decoded(grid()))
    found, expected = (
        attend(tier, call, QUERY_AT),
        reference(call, everything, layout, QUERY_AT),
    )
    torch.testing.assert_close(found.out, expected.out, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-5, atol=1e-5)


@every_codec
def test_without_numba_the_answers_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, num_heads = LAYOUTS["values unlike keys"]
    tier, call = fill_tier(name, layout), plain_call(layout, num_heads)
    expected = attend(tier, call, QUERY_AT)
    monkeypatch.setattr(sys.modules["offload.tiers.coded"], "compiled", lambda name: None)
    assert [type(part) for part in parts_of(tier, call, QUERY_AT)] == [PastChunks]
    check_equal(attend(tier, call, QUERY_AT), expected)


@every_codec
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_codes_of_half_precision_are_attended_before_they_are_rounded(
    name: str, dtype: torch.dtype
) -> None:
    layout = ChunkLayout(2, SIZE, 64, 64, dtype)
    tier = fill_tier(name, layout)
    call = plain_call(layout, 8)
    rows = tier.decoded(grid()).float()
    expected = reference(call, PastChunks(FIRST_TOKEN, rows), layout, QUERY_AT)
    found = attend(tier, replace(call, query=call.query.to(dtype)), QUERY_AT)
    torch.testing.assert_close(found.out, expected.out, rtol=0.02, atol=0.01)
    torch.testing.assert_close(found.lse, expected.lse, rtol=0.005, atol=0.01)
