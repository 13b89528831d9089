"""The remote tier keeps the contract, over a folder and over S3; so does a disk with one below."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.errors import CorruptChunk
from offload.tiers.base import Tier
from offload.tiers.remote_below import DiskThenRemote, is_remote
from offload.types import ChunkLayout
from tests.contracts.tier_contract import (
    WAIT_S,
    WHOLE_PAGES,
    TierContract,
    make_buffers,
    make_infos,
    same_chunks,
)
from tests.support.disk import make_disk_tier
from tests.support.remote import folder_bucket, make_remote_tier, s3_bucket
from tests.support.s3_server import s3_server


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


class TestRemoteTierInFolder(TierContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "bucket"

    def make_tier(self, num_slots: int, layout: ChunkLayout) -> Tier:
        return make_remote_tier(folder_bucket(self.folder), num_slots, layout)

    def test_close_removes_every_object_of_the_tier_and_no_other(self) -> None:
        tier, other = self.make_tier(4, WHOLE_PAGES), self.make_tier(4, WHOLE_PAGES)
        for each in (tier, other):
            each.write(each.allocate(3), make_infos(3), make_buffers(3, WHOLE_PAGES, 1)).wait(
                WAIT_S
            )
        assert len(self._objects()) == 6
        tier.close()
        assert len(self._objects()) == 3
        other.close()
        assert self._objects() == []

    def test_chunks_that_compress_take_fewer_bytes_than_they_have(self) -> None:
        tier = self.make_tier(2, WHOLE_PAGES)
        source = make_buffers(1, WHOLE_PAGES)
        source[0].view(torch.bfloat16).normal_(generator=torch.Generator().manual_seed(1))
        slots, out = tier.allocate(1), make_buffers(1, WHOLE_PAGES)
        tier.write(slots, make_infos(1), source).wait(WAIT_S)
        [file] = self._objects()
        assert file.stat().st_size < 0.85 * WHOLE_PAGES.chunk_bytes
        tier.read(slots, make_infos(1), out).wait(WAIT_S)
        assert same_chunks(out, source, WHOLE_PAGES)
        tier.close()

    @pytest.mark.parametrize("offset", [0, 9, 15, 40, 70, 85, 100, 150, -1])
    def test_any_flipped_byte_of_an_object_makes_the_read_fail(self, offset: int) -> None:
        tier = self.make_tier(2, WHOLE_PAGES)
        slots = tier.allocate(1)
        tier.write(slots, make_infos(1), make_buffers(1, WHOLE_PAGES, 2)).wait(WAIT_S)
        [file] = self._objects()
        content = bytearray(file.read_bytes())
        content[offset] ^= 1
        file.write_bytes(content)
        with pytest.raises(CorruptChunk):
            tier.read(slots, make_infos(1), make_buffers(1, WHOLE_PAGES)).wait(WAIT_S)
        tier.close()

    @pytest.mark.parametrize("keep", [0, 10, 128, -1])
    def test_truncated_object_makes_the_read_fail(self, keep: int) -> None:
        tier = self.make_tier(2, WHOLE_PAGES)
        slots = tier.allocate(1)
        tier.write(slots, make_infos(1), make_buffers(1, WHOLE_PAGES, 2)).wait(WAIT_S)
        [file] = self._objects()
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(CorruptChunk):
            tier.read(slots, make_infos(1), make_buffers(1, WHOLE_PAGES)).wait(WAIT_S)
        tier.close()

    def test_read_of_another_chunk_than_was_written_fails(self) -> None:
        tier = self.make_tier(2, WHOLE_PAGES)
        slots = tier.allocate(1)
        tier.write(slots, make_infos(1), make_buffers(1, WHOLE_PAGES, 2)).wait(WAIT_S)
        with pytest.raises(CorruptChunk, match="key should be"):
            tier.read(slots, make_infos(1, layer=1), make_buffers(1, WHOLE_PAGES)).wait(WAIT_S)
        tier.close()

    def _objects(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


class TestRemoteTierOnS3(TierContract):
    @pytest.fixture(autouse=True)
    def _port(self, port: int) -> None:
        self.port = port

    def make_tier(self, num_slots: int, layout: ChunkLayout) -> Tier:
        return make_remote_tier(s3_bucket(self.port, uuid.uuid4().hex), num_slots, layout)


class TestDiskThenRemote(TierContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make_tier(self, num_slots: int, layout: ChunkLayout) -> DiskThenRemote:
        near = num_slots // 2
        disk = make_disk_tier(self.folder / "disk", near, layout)
        far = make_remote_tier(folder_bucket(self.folder / "bucket"), num_slots - near, layout)
        return DiskThenRemote(disk, far)

    def test_slots_are_taken_on_the_disk_first_and_come_back_to_it(self) -> None:
        tier = self.make_tier(8, WHOLE_PAGES)
        slots = tier.allocate(3) + tier.allocate(3)
        assert [is_remote(slot) for slot in slots] == [False] * 4 + [True] * 2
        tier.free(slots[:2])
        assert not any(is_remote(slot) for slot in tier.allocate(2))
        tier.close()

    def test_parts_are_read_from_both(self) -> None:
        layout = ChunkLayout(4, 16, 64, 64, torch.bfloat16)
        tier = self.make_tier(4, layout)
        source, slots, infos = make_buffers(4, layout, 7), tier.allocate(4), make_infos(4)
        tier.write(slots, infos, source).wait(WAIT_S)
        each = tier.parts_per_head
        out = [torch.zeros(layout.chunk_bytes // 4, dtype=torch.uint8) for _ in slots]
        heads = [3, 0, 1, 2]
        tier.read_parts(slots, infos, [head * each for head in heads], out, num_parts=each).wait(
            WAIT_S
        )
        for found, chunk, head in zip(out, source, heads, strict=True):
            assert torch.equal(found, chunk[: layout.chunk_bytes].view(4, -1)[head])
        tier.close()
