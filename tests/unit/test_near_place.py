"""Heads are divided evenly, each byte of a chunk belongs to one worker, and costs are the sum."""

from pathlib import Path

import pytest
import torch

from offload.errors import ConfigError
from offload.tiers.near.place import places
from offload.types import PAGE_BYTES, ChunkLayout

LAYOUTS = [
    ChunkLayout(8, 64, 128, 128, torch.bfloat16),
    ChunkLayout(3, 5, 7, 9, torch.float32),
    ChunkLayout(1, 16, 32, 32, torch.float16),
]


def divide(layout: ChunkLayout, num_paths: int, each: int) -> list[int]:
    """Return the number of heads of every worker, having checked that they follow each other."""
    shares = places([Path(f"/{i}") for i in range(num_paths)], layout, each)
    assert [str(share.directory) for share in shares] == [
        f"/{i}" for i in range(num_paths) for _ in range(each)
    ]
    heads = [share.layout.num_kv_heads for share in shares]
    assert [share.first_head for share in shares] == [sum(heads[:i]) for i in range(len(heads))]
    assert sum(heads) == layout.num_kv_heads
    return heads


@pytest.mark.parametrize(
    ("num_paths", "each", "heads"),
    [(1, 1, [8]), (2, 1, [4, 4]), (1, 3, [2, 3, 3]), (2, 4, [1] * 8), (5, 1, [1, 2, 1, 2, 2])],
)
def test_heads_are_divided_evenly_among_the_workers_of_all_paths(
    num_paths: int, each: int, heads: list[int]
) -> None:
    assert divide(LAYOUTS[0], num_paths, each) == heads


@pytest.mark.parametrize(("num_paths", "each"), [(0, 1), (9, 1), (3, 3), (1, 9)])
def test_more_workers_than_heads_or_none_are_refused_with_the_numbers(
    num_paths: int, each: int
) -> None:
    with pytest.raises(ConfigError, match=rf"^{num_paths} paths with {each} workers .* 8 KV heads"):
        divide(LAYOUTS[0], num_paths, each)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.num_kv_heads}_heads")
def test_parts_of_a_chunk_are_its_bytes_in_order(layout: ChunkLayout) -> None:
    shares = places([Path("/")], layout, layout.num_kv_heads)
    buffer = torch.arange(layout.slot_bytes).to(torch.uint8)
    parts = torch.cat([share.part_of(buffer) for share in shares])
    assert torch.equal(parts, buffer[: layout.chunk_bytes])
    shares[-1].part_of(buffer).fill_(0)
    assert not buffer[layout.chunk_bytes - 1]


@pytest.mark.parametrize("group_size", [1, 4])
def test_queries_of_all_workers_are_those_of_the_model_in_order(group_size: int) -> None:
    layout = LAYOUTS[0]
    query = torch.randn(2, 8 * group_size, 128)
    shares = places([Path("/a"), Path("/b")], layout, 1)
    parts = [share.queries_of(query, layout.num_kv_heads) for share in shares]
    assert torch.equal(torch.cat(parts, 1), query)
    assert [part.shape[1] for part in parts] == [4 * group_size] * 2


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.num_kv_heads}_heads")
def test_cost_of_a_slot_covers_header_pages_payload_and_codes(layout: ChunkLayout) -> None:
    [share] = places([Path("/")], layout, 1)
    codes = layout.num_kv_heads * layout.key_dim * layout.chunk_tokens
    assert share.slot_cost(has_channels=False) == PAGE_BYTES + layout.slot_bytes
    more = share.slot_cost(has_channels=True) - share.slot_cost(has_channels=False)
    # Dead ones in the same block take at most half as much again.
    assert codes < more <= 3 * (codes + 2 * PAGE_BYTES) // 2 + PAGE_BYTES
    assert more % PAGE_BYTES == 0
