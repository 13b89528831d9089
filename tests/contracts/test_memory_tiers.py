"""The memory tiers keep the contract of a tier."""

import pytest
import torch

from offload.errors import CapacityError
from offload.tiers.memory import MemoryTier
from offload.types import ChunkLayout
from tests.contracts.tier_contract import (
    WAIT_S,
    WHOLE_PAGES,
    TierContract,
    make_buffers,
    make_infos,
)


def make_memory_tier(name: str, capacity_bytes: int, layout: ChunkLayout) -> MemoryTier:
    device = torch.device("cpu")
    return MemoryTier(name, capacity_bytes=capacity_bytes, layout=layout, device=device)


class TestGpuTierOnTheCpu(TierContract):
    def make_tier(self, num_slots: int, layout: ChunkLayout) -> MemoryTier:
        return make_memory_tier("gpu", num_slots * layout.slot_bytes, layout)


class TestCpuTier(TierContract):
    def make_tier(self, num_slots: int, layout: ChunkLayout) -> MemoryTier:
        return make_memory_tier("cpu", num_slots * layout.slot_bytes, layout)


@pytest.mark.parametrize(("extra", "num_slots"), [(-1, 2), (0, 3), (4095, 3)])
def test_capacity_that_is_no_whole_number_of_slots_is_rounded_down(
    extra: int, num_slots: int
) -> None:
    tier = make_memory_tier("cpu", 3 * WHOLE_PAGES.slot_bytes + extra, WHOLE_PAGES)
    assert tier.num_slots == num_slots
    tier.close()


def test_full_tier_names_itself_in_the_error() -> None:
    tier = make_memory_tier("cpu", WHOLE_PAGES.slot_bytes, WHOLE_PAGES)
    with pytest.raises(CapacityError, match="cpu tier full: 2 slots requested, 1 free of 1"):
        tier.allocate(2)
    tier.close()


def test_buffer_is_the_slot_itself() -> None:
    tier = make_memory_tier("cpu", 2 * WHOLE_PAGES.slot_bytes, WHOLE_PAGES)
    slots, source = tier.allocate(2), make_buffers(2, WHOLE_PAGES, seed=1)
    tier.write(slots, make_infos(2), source).wait(WAIT_S)
    assert torch.equal(tier.buffer(slots[1]), source[1])
    tier.buffer(slots[0]).zero_()
    out = make_buffers(1, WHOLE_PAGES, seed=2)
    tier.read(slots[:1], make_infos(1), out).wait(WAIT_S)
    assert not out[0].any()
    tier.close()
