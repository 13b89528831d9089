"""Sealed records of a disk tier: whole, in part, and after somebody has changed them."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import xxhash
from torch import Tensor

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.codec_ladder import CODECS, find_codec
from offload.tiers.disk import DiskTier
from offload.tiers.pool import page_aligned
from offload.tiers.record import RecordFormat
from offload.tiers.sealing import Sealer
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout, SlotId

LAYOUTS = {
    "pages": ChunkLayout(2, 128, 64, 64, torch.bfloat16),
    "odd": ChunkLayout(3, 20, 24, 40, torch.bfloat16),
}
NUM = 5
WAIT_S = 60.0


@dataclass
class Filled:
    """A tier with records, and what they must hold."""

    tier: DiskTier
    slots: list[SlotId]
    infos: list[ChunkInfo]
    chunks: Tensor

    def read(self) -> Tensor:
        out = page_aligned(self.chunks.numel()).view(self.chunks.shape)
        self.tier.read(self.slots, self.infos, list(out)).wait(WAIT_S)
        return out[:, : self.tier.layout.chunk_bytes]

    def read_part(self, part: int) -> None:
        out = [page_aligned(self.tier.part_bytes)]
        parts = slice(part, part + 1)
        self.tier.read_parts(self.slots[:1], self.infos[:1], parts, out).wait(WAIT_S)

    @property
    def file(self) -> Path:
        return self.tier.place_of(self.slots[0])[0]

    def forget_headers(self) -> None:
        self.tier._headers.clear()


def fill(path: Path, layout: ChunkLayout, codec: str = "raw") -> Filled:
    encoder = find_codec(codec)
    tier = DiskTier(
        path,
        capacity_bytes=1 << 24,
        layout=layout,
        num_threads=2,
        sealer=Sealer.of_this_process(),
        choose_codec=(lambda info: encoder) if encoder.number else None,
    )
    chunks = page_aligned(NUM * layout.slot_bytes).view(NUM, -1)
    chunks.zero_()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(NUM, layout.num_elements, generator=generator).bfloat16()
    chunks[:, : layout.chunk_bytes] = rows.view(torch.uint8)
    infos = [ChunkInfo(secrets.randbits(63), 0, i * layout.chunk_tokens) for i in range(NUM)]
    slots = tier.allocate(NUM)
    tier.write(slots, infos, list(chunks)).wait(WAIT_S)
    return Filled(tier, slots, infos, chunks[:, : layout.slot_bytes])


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    found = fill(tmp_path, LAYOUTS["pages"])
    yield found
    found.tier.close()


def with_right_checksums(record: bytearray) -> bytes:
    """Return a record whose page is made anew over what is in it, as who forges one would."""
    record[4088:4096] = xxhash.xxh3_64_intdigest(bytes(record[:4088])).to_bytes(8, "little")
    return bytes(record)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sealed_records_come_back_as_plain_ones_do_and_show_nothing(
    layout: ChunkLayout, codec: str, tmp_path: Path
) -> None:
    filled = fill(tmp_path, layout, codec)
    content = filled.file.read_bytes()

    found = filled.read()

    if find_codec(codec).is_lossless:
        assert torch.equal(found, filled.chunks[:, : layout.chunk_bytes])
    else:
        rows = (found.contiguous(), filled.chunks[:, : layout.chunk_bytes].contiguous())
        apart = rows[0].view(torch.bfloat16).float() - rows[1].view(torch.bfloat16).float()
        assert apart.abs().max() < 3
    assert filled.chunks[0, :32].numpy().tobytes() not in content
    filled.tier.close()


@pytest.mark.parametrize("codec", ["raw", "kivi4"])
@pytest.mark.parametrize("knows_headers", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_part_of_a_sealed_record_is_what_the_whole_has_there(
    layout: ChunkLayout, knows_headers: bool, codec: str, tmp_path: Path
) -> None:
    filled = fill(tmp_path, layout, codec)
    tier, whole = filled.tier, filled.read()
    if not knows_headers:
        filled.forget_headers()
    num_parts = layout.num_kv_heads * tier.parts_per_head
    out = page_aligned(NUM * tier.part_bytes).view(NUM, -1)

    for part in (0, num_parts // 2, num_parts - 1):
        tier.read_parts(filled.slots, filled.infos, slice(part, part + 1), list(out)).wait(WAIT_S)
        assert torch.equal(out, whole[:, part * tier.part_bytes : (part + 1) * tier.part_bytes])
    tier.close()


@pytest.mark.parametrize("offset", [0, 11, 48, 81, 200, 500, 4090, 4096, 9000, 60000])
def test_flipped_bit_of_a_sealed_record_is_corrupt(filled: Filled, offset: int) -> None:
    content = bytearray(filled.file.read_bytes())
    content[offset] ^= 4
    filled.file.write_bytes(content)

    with pytest.raises(CorruptChunk):
        filled.read()


@pytest.mark.parametrize("offset", [4096, 9000, 36000], ids=lambda at: f"byte {at}")
@pytest.mark.parametrize("is_part", [True, False])
def test_forged_record_whose_checksums_are_right_is_corrupt(
    filled: Filled, offset: int, is_part: bool
) -> None:
    size = filled.tier.record_bytes
    record = bytearray(filled.file.read_bytes()[:size])
    record[offset] ^= 1
    payload = bytes(record[PAGE_BYTES:])
    each = 64 * 128 * 2
    for unit in range(4):
        digest = xxhash.xxh3_64_intdigest(payload[unit * each : (unit + 1) * each])
        record[80 + 8 * unit : 88 + 8 * unit] = digest.to_bytes(8, "little")
    record[4080:4088] = xxhash.xxh3_64_intdigest(payload).to_bytes(8, "little")
    with filled.file.open("r+b") as file:
        file.write(with_right_checksums(record))
    filled.forget_headers()

    read = partial(filled.read_part, (offset - PAGE_BYTES) // PAGE_BYTES)

    with pytest.raises(CorruptChunk, match="is not what was sealed"):
        (read if is_part else filled.read)()


def test_record_at_another_index_of_the_file_is_corrupt(filled: Filled) -> None:
    size, content = filled.tier.record_bytes, filled.file.read_bytes()
    filled.file.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])
    filled.forget_headers()
    filled.infos[:2] = filled.infos[1::-1]  # so that the headers are as they should be

    with pytest.raises(CorruptChunk, match="sealed for record 0"):
        filled.read()


def test_record_of_another_file_is_corrupt(filled: Filled, tmp_path: Path) -> None:
    moved = tmp_path / "other.kvseg"
    moved.write_bytes(filled.file.read_bytes())
    slots = filled.tier.adopt(moved, b"", range(NUM), filled.tier._io.fmt.sealer)
    out = page_aligned(filled.chunks.numel()).view(filled.chunks.shape)

    with pytest.raises(CorruptChunk, match="sealed for record 0 of other"):
        filled.tier.read(slots, filled.infos, list(out)).wait(WAIT_S)


def test_plain_record_in_the_place_of_a_sealed_one_is_corrupt(
    filled: Filled, tmp_path: Path
) -> None:
    plain = DiskTier(tmp_path / "plain", capacity_bytes=1 << 24, layout=filled.tier.layout)
    slots = plain.allocate(NUM)
    plain.write(slots, filled.infos, list(filled.chunks)).wait(WAIT_S)
    filled.file.write_bytes(plain.place_of(slots[0])[0].read_bytes())
    filled.forget_headers()

    with pytest.raises(CorruptChunk, match="not sealed, where every record is"):
        filled.read()
    plain.close()


def test_sealed_record_without_a_key_is_no_damage(filled: Filled, tmp_path: Path) -> None:
    plain = DiskTier(tmp_path / "plain", capacity_bytes=0, layout=filled.tier.layout)
    slots = plain.adopt(filled.file, b"", range(NUM))
    out = page_aligned(filled.chunks.numel()).view(filled.chunks.shape)

    with pytest.raises(ConfigError, match="takes the key"):
        plain.read(slots, filled.infos, list(out)).wait(WAIT_S)
    assert not plain.take_suspects()
    plain.close()


def test_same_chunk_written_again_looks_different(filled: Filled) -> None:
    before = filled.file.read_bytes()
    filled.tier.write(filled.slots, filled.infos, list(filled.chunks)).wait(WAIT_S)
    after = filled.file.read_bytes()

    same = sum(a == b for a, b in zip(before[4096:36864], after[4096:36864], strict=True))
    assert same < 32768 / 100
    assert torch.equal(filled.read(), filled.chunks[:, : filled.tier.layout.chunk_bytes])


def test_sealed_record_of_too_many_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 141 KV heads, not 142"):
        RecordFormat(ChunkLayout(142, 8, 4, 4, torch.float32), b"", Sealer.of_this_process())
