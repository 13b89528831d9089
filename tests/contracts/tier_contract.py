"""What every tier must do. Not collected itself: subclass ``TierContract`` as ``Test…``."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from offload.errors import CapacityError, ClosedError
from offload.tiers.base import Tier
from offload.tiers.pool import page_aligned
from offload.types import ChunkInfo, ChunkLayout, SlotId

WHOLE_PAGES = ChunkLayout(2, 16, 32, 32, torch.bfloat16)
PADDED = ChunkLayout(3, 5, 7, 9, torch.float32)
WAIT_S = 30.0

MakeTier = Callable[..., Tier]


def make_infos(n: int, layer: int = 0, first_id: int = 0) -> list[ChunkInfo]:
    """Return ``n`` chunks of one layer that follow each other."""
    return [ChunkInfo(first_id + i, layer, 64 * i) for i in range(n)]


def make_buffers(n: int, layout: ChunkLayout, seed: int | None = None) -> list[Tensor]:
    """Return page-aligned host buffers, zeros unless ``seed`` is given."""
    memory = page_aligned(n * layout.slot_bytes).view(n, layout.slot_bytes)
    if seed is not None:
        memory.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return list(memory)


def same_chunks(found: list[Tensor], expected: list[Tensor], layout: ChunkLayout) -> bool:
    """Compare chunks; what pads a slot means nothing."""
    end = layout.chunk_bytes
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a[:end].cpu(), b[:end].cpu()) for a, b in pairs)


class TierContract(ABC):
    """Subclass, and say how to make the tier."""

    @abstractmethod
    def make_tier(self, num_slots: int, layout: ChunkLayout) -> Tier:
        """Return a new, empty tier. The contract closes it."""

    def stored(self, chunks: list[Tensor], layout: ChunkLayout) -> list[Tensor]:
        """Return what is read of chunks that were written; not the same if the tier loses some."""
        return chunks

    @pytest.fixture
    def new_tier(self) -> Iterator[MakeTier]:
        """Make tiers that are closed, and checked once more, when the test is over."""
        tiers: list[Tier] = []

        def make(num_slots: int = 8, layout: ChunkLayout = WHOLE_PAGES) -> Tier:
            tiers.append(self.make_tier(num_slots, layout))
            return tiers[-1]

        yield make
        for tier in tiers:
            tier.check_integrity()
            tier.close()

    def test_new_tier_is_empty(self, new_tier: MakeTier) -> None:
        tier = new_tier(num_slots=8)
        assert (tier.num_slots, tier.num_free, tier.used_bytes) == (8, 8, 0)

    def test_capacity_covers_every_slot_when_the_tier_is_full(self, new_tier: MakeTier) -> None:
        tier = new_tier(num_slots=8)
        tier.allocate(8)
        assert tier.num_free == 0
        assert 8 * tier.slot_bytes <= tier.used_bytes <= tier.capacity_bytes

    def test_allocate_within_capacity_returns_distinct_slots(self, new_tier: MakeTier) -> None:
        tier = new_tier(num_slots=8)
        slots = tier.allocate(3) + tier.allocate(0) + tier.allocate(5, stream=7)
        assert len(set(slots)) == 8

    def test_allocate_beyond_capacity_raises_and_takes_nothing(self, new_tier: MakeTier) -> None:
        tier = new_tier(num_slots=8)
        tier.allocate(6)
        used_bytes = tier.used_bytes
        with pytest.raises(CapacityError, match=r"3 .*2 "):
            tier.allocate(3)
        assert (tier.num_free, tier.used_bytes) == (2, used_bytes)
        assert len(tier.allocate(2)) == 2

    def test_free_all_slots_makes_the_tier_empty_again(self, new_tier: MakeTier) -> None:
        tier = new_tier(num_slots=8)
        slots = tier.allocate(5, stream=1) + tier.allocate(3, stream=2)
        tier.free([])
        tier.free(slots[::2])
        tier.free(slots[1::2])
        assert (tier.num_free, tier.used_bytes) == (8, 0)

    def test_slots_freed_after_writing_can_be_allocated_again(self, new_tier: MakeTier) -> None:
        tier = new_tier(num_slots=8)
        infos, source = make_infos(8), make_buffers(8, WHOLE_PAGES, seed=1)
        slots = tier.allocate(8)
        tier.write(slots, infos, source).wait(WAIT_S)
        tier.free(slots[2:6])
        again = tier.allocate(4)
        tier.write(again, make_infos(4, first_id=8), source[4:]).wait(WAIT_S)
        out = make_buffers(4, WHOLE_PAGES)
        tier.read(again, make_infos(4, first_id=8), out).wait(WAIT_S)
        assert same_chunks(out, self.stored(source[4:], WHOLE_PAGES), WHOLE_PAGES)

    @pytest.mark.parametrize("layout", [WHOLE_PAGES, PADDED], ids=["whole_pages", "padded"])
    def test_read_after_write_returns_the_same_bytes(
        self, new_tier: MakeTier, layout: ChunkLayout
    ) -> None:
        tier = new_tier(layout=layout)
        infos, source, out = make_infos(5), make_buffers(5, layout, 2), make_buffers(5, layout)
        slots = tier.allocate(5)
        tier.write(slots, infos, source).wait(WAIT_S)
        tier.read(slots, infos, out).wait(WAIT_S)
        assert same_chunks(out, self.stored(source, layout), layout)

    @pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [3], [0, 2, 4], [1, 1]], ids=str)
    def test_read_in_any_order_fills_each_buffer_from_its_slot(
        self, new_tier: MakeTier, order: list[int]
    ) -> None:
        tier = new_tier()
        infos, source = make_infos(5), make_buffers(5, WHOLE_PAGES, seed=3)
        slots = tier.allocate(5)
        tier.write(slots, infos, source).wait(WAIT_S)
        out = make_buffers(len(order), WHOLE_PAGES)
        tier.read([slots[i] for i in order], [infos[i] for i in order], out).wait(WAIT_S)
        assert same_chunks(out, self.stored([source[i] for i in order], WHOLE_PAGES), WHOLE_PAGES)

    def test_write_of_one_slot_leaves_the_others_alone(self, new_tier: MakeTier) -> None:
        tier = new_tier()
        infos, source = make_infos(3), make_buffers(4, WHOLE_PAGES, seed=4)
        slots = tier.allocate(3)
        tier.write(slots, infos, source[:3]).wait(WAIT_S)
        tier.write(slots[1:2], infos[1:2], source[3:]).wait(WAIT_S)
        out = make_buffers(3, WHOLE_PAGES)
        tier.read(slots, infos, out).wait(WAIT_S)
        assert same_chunks(
            out, self.stored([source[0], source[3], source[2]], WHOLE_PAGES), WHOLE_PAGES
        )

    def test_slots_of_several_streams_keep_their_own_content(self, new_tier: MakeTier) -> None:
        tier = new_tier()
        source = make_buffers(6, WHOLE_PAGES, seed=5)
        infos = [ChunkInfo(i, i % 3, 64 * (i // 3)) for i in range(6)]
        slots = [tier.allocate(1, stream=info.layer)[0] for info in infos]
        tier.write(slots, infos, source).wait(WAIT_S)
        out = make_buffers(6, WHOLE_PAGES)
        tier.read(slots, infos, out).wait(WAIT_S)
        assert same_chunks(out, self.stored(source, WHOLE_PAGES), WHOLE_PAGES)

    def test_finished_transfer_is_done_and_cannot_be_cancelled(self, new_tier: MakeTier) -> None:
        tier = new_tier()
        slots = tier.allocate(2)
        transfer = tier.write(slots, make_infos(2), make_buffers(2, WHOLE_PAGES, seed=6))
        transfer.wait(WAIT_S)
        transfer.wait(0)
        assert transfer.done()
        assert not transfer.cancel()
        assert transfer.num_bytes == 2 * tier.slot_bytes

    def test_transfer_of_nothing_is_done(self, new_tier: MakeTier) -> None:
        tier = new_tier()
        tier.write([], [], []).wait(WAIT_S)
        tier.read([], [], []).wait(WAIT_S)

    @pytest.mark.parametrize("seed", range(4))
    def test_any_sequence_of_calls_agrees_with_a_dictionary(
        self, new_tier: MakeTier, seed: int
    ) -> None:
        tier, choose = new_tier(num_slots=12), random.Random(seed)
        held: dict[SlotId, tuple[ChunkInfo, Tensor]] = {}
        for step in range(40):
            n, layer = choose.randint(1, 5), choose.randint(0, 2)
            if n <= tier.num_free and choose.random() < 0.6:
                slots = tier.allocate(n, stream=layer)
                infos = make_infos(n, layer, first_id=100 * step)
                source = make_buffers(n, WHOLE_PAGES, seed=step)
                tier.write(slots, infos, source).wait(WAIT_S)
                held.update(zip(slots, zip(infos, source, strict=True), strict=True))
            elif held:
                gone = choose.sample(sorted(held), min(n, len(held)))
                tier.free(gone)
                for slot in gone:
                    del held[slot]
            tier.check_integrity()
            assert tier.num_free == 12 - len(held)
            out = make_buffers(len(held), WHOLE_PAGES)
            tier.read(list(held), [info for info, _ in held.values()], out).wait(WAIT_S)
            assert same_chunks(
                out,
                self.stored([content for _, content in held.values()], WHOLE_PAGES),
                WHOLE_PAGES,
            )

    def test_closed_tier_refuses_to_allocate(self, new_tier: MakeTier) -> None:
        tier = new_tier()
        tier.allocate(2)
        tier.close()
        tier.close()
        with pytest.raises(ClosedError):
            tier.allocate(1)
        assert tier.used_bytes == 0
