"""Slots: handed out lowest first, never twice, viewed without a copy."""

import pytest
import torch

from offload.errors import CapacityError
from offload.tiers.pool import SlotPool, as_chunk, grid_view, page_aligned
from offload.types import PAGE_BYTES, ChunkLayout, SlotId

LAYOUT = ChunkLayout(2, 4, 3, 5, torch.float32)
CPU = torch.device("cpu")


def make_pool(num_slots: int = 8) -> SlotPool:
    return SlotPool(num_slots, LAYOUT.slot_bytes, CPU)


def test_allocate_returns_the_lowest_free_slots() -> None:
    pool = make_pool()
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.free([SlotId(2), SlotId(0)])
    assert pool.allocate(3) == [0, 2, 4]
    pool.check_integrity()


def test_allocate_of_nothing_takes_nothing() -> None:
    pool = make_pool()
    assert pool.allocate(0) == []
    assert pool.num_free == 8


def test_allocate_beyond_what_is_free_raises_with_the_numbers_and_takes_nothing() -> None:
    pool = make_pool()
    pool.allocate(6)
    with pytest.raises(CapacityError, match=r"3 slots requested, 2 free of 8 \(4096 bytes each\)"):
        pool.allocate(3)
    assert pool.num_free == 2
    pool.check_integrity()


@pytest.mark.parametrize("slots", [[5], [0, 0]], ids=["never_taken", "twice"])
def test_free_of_a_slot_that_is_not_used_raises(slots: list[SlotId]) -> None:
    pool = make_pool()
    pool.allocate(2)
    with pytest.raises(KeyError):
        pool.free(slots)


def test_shrink_retires_free_slots_at_once_and_used_ones_when_freed() -> None:
    pool = make_pool()
    pool.allocate(6)
    pool.shrink(4)
    assert (pool.num_slots, pool.num_free) == (4, 0)
    pool.check_integrity()
    pool.free([SlotId(5), SlotId(1)])
    pool.check_integrity()
    assert pool.allocate(1) == [1]
    with pytest.raises(CapacityError):
        pool.allocate(1)


def test_shrink_to_more_than_there_is_changes_nothing() -> None:
    pool = make_pool()
    pool.shrink(20)
    assert (pool.num_slots, pool.num_free) == (8, 8)


def test_used_slot_beyond_a_shrunk_pool_keeps_its_content() -> None:
    pool = make_pool()
    slots = pool.allocate(8)
    pool.slab[slots[7]] = 7
    pool.shrink(2)
    assert (pool.slab[slots[7]] == 7).all()


@pytest.mark.parametrize("num_bytes", [1, PAGE_BYTES, 3 * PAGE_BYTES + 1])
def test_page_aligned_memory_is_aligned_zeroed_and_exact(num_bytes: int) -> None:
    memory = page_aligned(num_bytes)
    assert memory.numel() == num_bytes
    assert memory.data_ptr() % PAGE_BYTES == 0
    assert not memory.any()


def test_page_aligned_memory_of_nothing_is_empty() -> None:
    assert page_aligned(0).numel() == 0


def test_chunk_is_a_view_of_its_slot_alone() -> None:
    pool = make_pool(3)
    pool.chunk(SlotId(1), LAYOUT).fill_(1.5)
    assert pool.chunk(SlotId(1), LAYOUT).shape == (2, 4, 8)
    assert not pool.slab[0].any()
    assert not pool.slab[2].any()
    assert not pool.slab[1, LAYOUT.chunk_bytes :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize(
    ("base", "strides"), [(0, (1, 2)), (1, (3, 1)), (2, (0, 2)), (5, (1, 0)), (0, (4, 1))]
)
def test_grid_view_reads_the_slots_of_the_grid_in_place(
    base: int, strides: tuple[int, int], dtype: torch.dtype
) -> None:
    layout = ChunkLayout(2, 4, 3, 5, dtype)
    slab = page_aligned(8 * layout.slot_bytes).view(8, layout.slot_bytes)
    for slot in range(8):
        as_chunk(slab[slot], layout).fill_(slot)
    grid = grid_view(slab, base, strides, (2, 3), layout)
    expected = [[base + i * strides[0] + j * strides[1] for j in range(3)] for i in range(2)]
    assert grid.shape == (2, 3, 2, 4, 8)
    assert (grid == torch.tensor(expected, dtype=dtype)[..., None, None, None]).all()
    grid[0, 0] = 99
    assert (as_chunk(slab[base], layout) == 99).all()


def test_grid_view_of_a_part_of_a_slab_starts_at_that_part() -> None:
    slab = page_aligned(8 * LAYOUT.slot_bytes).view(2, 4, LAYOUT.slot_bytes)
    as_chunk(slab[1, 2], LAYOUT).fill_(3)
    assert (grid_view(slab[1], 2, (1, 1), (1, 1), LAYOUT) == 3).all()
