"""The disk tier keeps the contract, and what it promises beyond it."""

import stat
from pathlib import Path

import pytest
import torch

from offload.errors import ClosedError, ConfigError, CorruptChunk
from offload.tiers.disk import DiskTier
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout
from tests.contracts.tier_contract import (
    PADDED,
    WAIT_S,
    WHOLE_PAGES,
    TierContract,
    make_buffers,
    make_infos,
    same_chunks,
)
from tests.support.disk import make_disk_tier


def allocated_bytes(directory: Path) -> int:
    """Return what the file system has given to the files of a directory."""
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


class TestDiskTier(TierContract):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path / "disk"

    def make_tier(self, num_slots: int, layout: ChunkLayout) -> DiskTier:
        return make_disk_tier(self.directory, num_slots, layout)

    def test_capacity_counts_header_pages(self, tmp_path: Path) -> None:
        record_bytes = PAGE_BYTES + WHOLE_PAGES.slot_bytes
        tier = DiskTier(tmp_path, capacity_bytes=5 * record_bytes - 1, layout=WHOLE_PAGES)
        assert tier.num_slots == 4
        tier.close()

    def test_files_on_disk_never_exceed_capacity_under_churn(self) -> None:
        tier = self.make_tier(8, WHOLE_PAGES)
        source = make_buffers(3, WHOLE_PAGES, seed=1)
        held = []
        for step in range(20):
            infos = make_infos(3, first_id=3 * step)
            held.append(tier.allocate(3, stream=step % 2))
            tier.write(held[-1], infos, source).wait(WAIT_S)
            assert allocated_bytes(self.directory) <= tier.used_bytes <= tier.capacity_bytes
            if len(held) == 2:
                tier.free(held.pop(0))
        tier.close()

    def test_close_removes_every_file_of_the_tier_and_no_other(self) -> None:
        tier = self.make_tier(8, WHOLE_PAGES)
        tier.write(tier.allocate(8), make_infos(8), make_buffers(8, WHOLE_PAGES)).wait(WAIT_S)
        (self.directory / "mine").write_text("keep")
        assert len(list(self.directory.iterdir())) == 4
        tier.close()
        assert [path.name for path in self.directory.iterdir()] == ["mine"]

    def test_dead_segment_is_unlinked(self) -> None:
        tier = self.make_tier(8, WHOLE_PAGES)
        slots = tier.allocate(6)
        tier.write(slots, make_infos(6), make_buffers(6, WHOLE_PAGES, seed=2)).wait(WAIT_S)
        tier.free(slots[:3])
        assert len(list(self.directory.iterdir())) == 1
        tier.close()

    def test_folder_and_files_are_private_to_the_user(self) -> None:
        tier = self.make_tier(8, WHOLE_PAGES)
        tier.write(tier.allocate(1), make_infos(1), make_buffers(1, WHOLE_PAGES)).wait(WAIT_S)
        [file] = self.directory.iterdir()
        assert stat.S_IMODE(self.directory.stat().st_mode) == 0o700
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        tier.close()

    def test_two_tiers_in_one_directory_do_not_meet(self) -> None:
        first, second = self.make_tier(4, WHOLE_PAGES), self.make_tier(4, WHOLE_PAGES)
        source, out = make_buffers(2, WHOLE_PAGES, seed=3), make_buffers(1, WHOLE_PAGES)
        slots = first.allocate(1)
        first.write(slots, make_infos(1), source[:1]).wait(WAIT_S)
        second.write(second.allocate(1), make_infos(1), source[1:]).wait(WAIT_S)
        second.close()
        first.read(slots, make_infos(1), out).wait(WAIT_S)
        assert same_chunks(out, source[:1], WHOLE_PAGES)
        first.close()

    @pytest.mark.parametrize("layout", [WHOLE_PAGES, PADDED], ids=["whole_pages", "padded"])
    @pytest.mark.parametrize("shift", [0, 64], ids=["aligned", "unaligned"])
    def test_unaligned_buffers_are_written_and_read_too(
        self, layout: ChunkLayout, shift: int
    ) -> None:
        tier = self.make_tier(4, layout)
        source = make_buffers(2, layout, seed=4)
        memory = torch.zeros(2, layout.slot_bytes + 4096, dtype=torch.uint8)
        out = [row[shift : shift + layout.slot_bytes] for row in memory]
        slots = tier.allocate(2)
        tier.write(slots, make_infos(2), source).wait(WAIT_S)
        tier.read(slots, make_infos(2), out).wait(WAIT_S)
        tier.write(slots[:1], make_infos(1), out[1:]).wait(WAIT_S)
        again = make_buffers(1, layout)
        tier.read(slots[:1], make_infos(1), again).wait(WAIT_S)
        assert same_chunks([*out, *again], [*source, source[1]], layout)
        tier.close()

    @pytest.mark.parametrize("heads", [slice(0, 1), slice(1, 3), slice(2, None), slice(None)])
    @pytest.mark.parametrize(
        "layout",
        [ChunkLayout(4, 16, 64, 64, torch.bfloat16), ChunkLayout(4, 5, 7, 9, torch.float32)],
        ids=["whole_pages", "odd_bytes"],
    )
    def test_read_of_heads_returns_only_those_heads(
        self, layout: ChunkLayout, heads: slice
    ) -> None:
        tier = self.make_tier(4, layout)
        source, slots = make_buffers(2, layout, seed=5), tier.allocate(2)
        tier.write(slots, make_infos(2), source).wait(WAIT_S)
        chunks = [row[: layout.chunk_bytes].view(4, -1)[heads] for row in source]
        out = [torch.zeros(chunk.numel(), dtype=torch.uint8) for chunk in chunks]
        transfer = tier.read_parts(slots, make_infos(2), _parts(tier, heads), out)
        transfer.wait(WAIT_S)
        assert transfer.num_bytes == sum(chunk.numel() for chunk in chunks)
        assert all(torch.equal(a, b.flatten()) for a, b in zip(out, chunks, strict=True))
        tier.close()

    def test_read_of_heads_of_one_head_per_slot_returns_each(self) -> None:
        layout = ChunkLayout(4, 16, 64, 64, torch.bfloat16)
        tier = self.make_tier(4, layout)
        source, slots = make_buffers(3, layout, seed=5), tier.allocate(3)
        tier.write(slots, make_infos(3), source).wait(WAIT_S)
        order, heads = [2, 0, 2, 1], [3, 0, 1, 2]
        infos = make_infos(3)
        out = [torch.zeros(layout.chunk_bytes // 4, dtype=torch.uint8) for _ in order]
        each = tier.parts_per_head
        tier.read_parts(
            [slots[i] for i in order],
            [infos[i] for i in order],
            [head * each for head in heads],
            out,
            num_parts=each,
            urgent=False,
        ).wait(WAIT_S)
        for i, head, found in zip(order, heads, out, strict=True):
            assert torch.equal(found, source[i][: layout.chunk_bytes].view(4, -1)[head])
        assert tier.reading.total_s > 0
        tier.close()

    def test_heads_of_a_slot_that_was_written_again_are_the_new_ones(self) -> None:
        layout = ChunkLayout(4, 16, 64, 64, torch.bfloat16)
        tier = self.make_tier(4, layout)
        infos, slots = make_infos(1), tier.allocate(1)
        out = [torch.zeros(layout.chunk_bytes // 4, dtype=torch.uint8)]
        for seed in (5, 6):
            source = make_buffers(1, layout, seed=seed)
            tier.write(slots, infos, source).wait(WAIT_S)
            tier.read_parts(slots, infos, _parts(tier, slice(1, 2)), out).wait(WAIT_S)
            assert torch.equal(out[0], source[0][: layout.chunk_bytes].view(4, -1)[1])
        tier.free(slots)
        assert not tier._headers
        tier.close()

    @pytest.mark.parametrize("parts", [[0], [0, 4], [0, -1], [0, 1, 2]])
    def test_read_of_parts_that_are_not_one_per_slot_is_refused(self, parts: list[int]) -> None:
        tier = self.make_tier(4, ChunkLayout(4, 16, 64, 64, torch.bfloat16))
        with pytest.raises(ConfigError, match="1 of 4 parts for each of 2 slots"):
            tier.read_parts(tier.allocate(2), make_infos(2), parts, [])
        tier.close()

    @pytest.mark.parametrize("parts", [slice(1, 1), slice(0, 2, 2), slice(2, 0, -1)])
    def test_read_of_parts_that_are_not_consecutive_is_refused(self, parts: slice) -> None:
        tier = self.make_tier(4, WHOLE_PAGES)
        with pytest.raises(ConfigError, match="consecutive"):
            tier.read_parts([], [], parts, [])
        tier.close()

    @pytest.mark.parametrize("state", ["never_written", "freed", "foreign"])
    def test_read_of_a_slot_without_a_record_raises_corrupt_chunk(self, state: str) -> None:
        tier = self.make_tier(8, WHOLE_PAGES)
        infos, source = make_infos(2), make_buffers(2, WHOLE_PAGES, seed=6)
        slots = tier.allocate(2)
        tier.write(slots[:1], infos[:1], source[:1]).wait(WAIT_S)
        if state == "freed":
            tier.free(slots[:1])
        slot = {"never_written": slots[1], "freed": slots[0], "foreign": slots[1] + 1000}[state]
        transfer = tier.read([type(slots[0])(slot)], infos[:1], make_buffers(1, WHOLE_PAGES))
        with pytest.raises(CorruptChunk, match="hold no record"):
            transfer.wait(WAIT_S)
        tier.check_integrity()
        tier.close()

    @pytest.mark.parametrize(
        ("info", "found"),
        [
            (ChunkInfo(9, 0, 0), "chunk_id should be 9, the record has 0"),
            (ChunkInfo(0, 9, 0), "layer should be 9, the record has 0"),
            (ChunkInfo(0, 0, 9), "first_token should be 9, the record has 0"),
        ],
        ids=["chunk_id", "layer", "first_token"],
    )
    def test_read_of_another_chunk_than_the_one_written_raises_what_was_found(
        self, info: ChunkInfo, found: str
    ) -> None:
        tier = self.make_tier(8, WHOLE_PAGES)
        slots = tier.allocate(1)
        tier.write(slots, make_infos(1), make_buffers(1, WHOLE_PAGES, seed=7)).wait(WAIT_S)
        with pytest.raises(CorruptChunk, match=found):
            tier.read(slots, [info], make_buffers(1, WHOLE_PAGES)).wait(WAIT_S)
        tier.close()

    def test_write_to_a_slot_that_is_not_allocated_is_refused(self) -> None:
        tier = self.make_tier(8, WHOLE_PAGES)
        slots = tier.allocate(1)
        tier.free(slots)
        with pytest.raises(ConfigError, match="not allocated"):
            tier.write(slots, make_infos(1), make_buffers(1, WHOLE_PAGES))
        assert list(self.directory.iterdir()) == []
        tier.close()

    @pytest.mark.parametrize(
        "buffer",
        [
            torch.zeros(WHOLE_PAGES.slot_bytes - 1, dtype=torch.uint8),
            torch.zeros(WHOLE_PAGES.slot_bytes, dtype=torch.int8),
            torch.zeros(WHOLE_PAGES.slot_bytes, 2, dtype=torch.uint8)[:, 0],
        ],
        ids=["short", "dtype", "strided"],
    )
    def test_buffer_that_is_no_slot_is_refused(self, buffer: torch.Tensor) -> None:
        tier = self.make_tier(8, WHOLE_PAGES)
        with pytest.raises(ConfigError, match="takes contiguous uint8"):
            tier.write(tier.allocate(1), make_infos(1), [buffer])
        tier.close()

    def test_closed_tier_refuses_transfers_and_ignores_free(self) -> None:
        tier = self.make_tier(8, WHOLE_PAGES)
        slots, buffers = tier.allocate(1), make_buffers(1, WHOLE_PAGES)
        tier.close()
        with pytest.raises(ClosedError):
            tier.write(slots, make_infos(1), buffers)
        with pytest.raises(ClosedError):
            tier.read(slots, make_infos(1), buffers)
        tier.free(slots)

    def test_directory_that_is_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=str(tmp_path / "file")):
            make_disk_tier(tmp_path / "file", 8, WHOLE_PAGES)


def _parts(tier: DiskTier, heads: slice) -> slice:
    """Return the parts of consecutive heads."""
    first, stop, _ = heads.indices(tier.layout.num_kv_heads)
    return slice(first * tier.parts_per_head, stop * tier.parts_per_head)
