"""The working set: staging and write buffers fit into the capacities, or it is an error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import CapacityError
from offload.sparse.row_plan import RowMemory, RowPlan
from offload.types import ChunkLayout
from offload.working_set import plan_row_memory, plan_working_set

MIB = 1 << 20


@given(
    device=st.one_of(st.none(), st.integers(1, 1 << 34)),
    host=st.one_of(st.none(), st.integers(1, 1 << 34)),
    slot_pages=st.integers(1, 4096),
    tail_bytes=st.integers(0, 1 << 30),
    batch=st.integers(1, 64),
)
def test_working_set_of_any_machine_fits_or_raises(
    device: int | None, host: int | None, slot_pages: int, tail_bytes: int, batch: int
) -> None:
    slot_bytes = 4096 * slot_pages
    try:
        sizes = plan_working_set(device, host, slot_bytes, tail_bytes, batch)
    except CapacityError:
        smallest = tail_bytes + 2 * batch * slot_bytes
        too_small_device = device is not None and device < smallest
        too_small_host = host is not None and host < 2 * slot_bytes
        assert too_small_device or too_small_host
        return
    assert sizes.num_buffers >= 2
    assert sizes.buffer_chunks >= batch
    assert sizes.num_write_buffers >= 2
    staging = sizes.num_buffers * sizes.buffer_chunks * slot_bytes
    assert device is None or tail_bytes + staging <= device
    assert host is None or sizes.num_write_buffers * slot_bytes <= host


def test_device_below_tails_and_staging_raises_with_the_numbers() -> None:
    with pytest.raises(CapacityError, match=r"gpu capacity 20479 bytes.* 4096 bytes .* make 20480"):
        plan_working_set(5 * 4096 - 1, None, 4096, 4096, batch=2)


def test_device_of_exactly_the_smallest_working_set_is_enough() -> None:
    sizes = plan_working_set(5 * 4096, None, 4096, 4096, batch=2)
    assert (sizes.num_buffers, sizes.buffer_chunks) == (2, 2)


def test_host_below_two_write_buffers_raises_with_the_numbers() -> None:
    with pytest.raises(CapacityError, match=r"cpu capacity 8191 bytes .* 2 write buffers of 4096"):
        plan_working_set(None, 8191, 4096, 0, batch=1)


@pytest.mark.parametrize("device", [None, 1 << 34], ids=["no_device_tier", "large_device"])
def test_buffers_with_room_enough_are_large_enough_for_the_disk(device: int | None) -> None:
    sizes = plan_working_set(device, None, MIB // 4, MIB, batch=2)
    assert (sizes.num_buffers, sizes.buffer_chunks) == (4, 32)
    assert sizes.num_write_buffers == 64


def test_host_gives_write_buffers_an_eighth_at_most() -> None:
    assert plan_working_set(None, 8 * MIB, MIB // 4, 0, batch=1).num_write_buffers == 4


LAYOUT = ChunkLayout(8, 64, 128, 128, torch.bfloat16)
HEAD_BYTES = LAYOUT.chunk_bytes // 8


@given(spare=st.integers(HEAD_BYTES, 1 << 36), share=st.floats(0, 1))
def test_row_memory_of_any_capacity_holds_a_head_and_leaves_the_rest_to_chunks(
    spare: int, share: float
) -> None:
    memory = plan_row_memory(spare, LAYOUT, RowPlan(line_share=share))
    assert HEAD_BYTES <= memory.staging_bytes <= max(HEAD_BYTES, min(8 * MIB, spare // 8))
    assert memory.staging_bytes % HEAD_BYTES == 0
    assert memory.num_bytes <= spare
    assert abs(memory.line_bytes - share * (spare - memory.staging_bytes)) <= 1


def test_row_memory_below_one_head_raises_with_the_numbers() -> None:
    with pytest.raises(CapacityError, match=r"the 32767 bytes beside .* 32768 bytes"):
        plan_row_memory(HEAD_BYTES - 1, LAYOUT, RowPlan())


def test_row_memory_without_a_host_tier_is_staging_only() -> None:
    assert plan_row_memory(None, LAYOUT, RowPlan()) == RowMemory(8 * MIB, 0)
