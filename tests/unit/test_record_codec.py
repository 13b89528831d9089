"""Records that are encoded: whole, in parts, mixed with raw ones, and damaged."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.codec_choice import CodecChoice
from offload.tiers.codec_ladder import CODECS, find_codec
from offload.tiers.codecs import Codec
from offload.tiers.disk import DiskTier
from offload.tiers.pool import page_aligned
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout

LAYOUT = ChunkLayout(4, 128, 64, 64, torch.bfloat16)
WAIT_S = 30.0
CODED = [name for name, codec in CODECS.items() if codec.number]


def open_tier(directory: Path, choice: CodecChoice, layout: ChunkLayout = LAYOUT) -> DiskTier:
    return DiskTier(
        directory,
        capacity_bytes=16 * (PAGE_BYTES + layout.slot_bytes),
        layout=layout,
        num_threads=2,
        choose_codec=choice,
    )


def chunks(count: int, layout: ChunkLayout = LAYOUT) -> list[Tensor]:
    """Return slots of normal numbers, each channel with a scale of its own."""
    random = torch.Generator().manual_seed(3)
    memory = page_aligned(count * layout.slot_bytes).view(count, -1)
    scales = torch.rand(layout.row_dim, generator=random) * 4 + 0.1
    rows = torch.randn(count, *layout.shape, generator=random) * scales
    memory[:, : layout.chunk_bytes] = rows.to(layout.dtype).view(count, -1).view(torch.uint8)
    return list(memory)


class Written:
    """Chunks at consecutive positions of one layer, in a disk tier."""

    def __init__(self, tier: DiskTier, codec: Codec, count: int) -> None:
        layout = tier.layout
        self.codec = codec
        self.tier, self.source = tier, chunks(count, layout)
        self.infos = [ChunkInfo(i, 0, i * layout.chunk_tokens) for i in range(count)]
        self.slots = tier.allocate(count)
        tier.write(self.slots, self.infos, self.source).wait(WAIT_S)

    def read(self) -> list[Tensor]:
        out = list(page_aligned(len(self.slots) * self.tier.slot_bytes).view(len(self.slots), -1))
        self.tier.read(self.slots, self.infos, out).wait(WAIT_S)
        return out

    def read_parts(self, members: list[int], parts: list[int], num_parts: int) -> list[Tensor]:
        num_bytes = num_parts * self.tier.part_bytes
        out = list(page_aligned(len(members) * num_bytes).view(len(members), -1))
        self.tier.read_parts(
            [self.slots[i] for i in members],
            [self.infos[i] for i in members],
            parts,
            out,
            num_parts=num_parts,
        ).wait(WAIT_S)
        return out


@pytest.fixture
def written(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Written]:
    name, share = request.param
    codec = find_codec(name)
    with closing(open_tier(tmp_path, CodecChoice(128, codec, share))) as tier:
        yield Written(tier, codec, 6)


every_codec = pytest.mark.parametrize("written", [(name, 1.0) for name in CODED], indirect=True)


def values(buffer: Tensor, layout: ChunkLayout = LAYOUT) -> Tensor:
    return buffer[: layout.chunk_bytes].view(layout.dtype).view(layout.shape)


@every_codec
def test_chunk_comes_back_as_exactly_as_its_codec_promises(written: Written) -> None:
    for source, found in zip(written.source, written.read(), strict=True):
        if written.codec.is_lossless:
            assert torch.equal(source, found)
        error = (values(found).float() - values(source).float()).norm()
        assert error <= 0.5 * values(source).float().norm()


@every_codec
def test_parts_of_an_encoded_chunk_are_those_of_the_whole(written: Written) -> None:
    whole = written.read()
    each, size = written.tier.parts_per_head, written.tier.part_bytes
    members, parts = [3, 0, 3, 3, 5], [0, each + 1, 1, 4 * each - 2, 2]
    for i, part, found in zip(members, parts, written.read_parts(members, parts, 2), strict=True):
        assert torch.equal(found, whole[i][part * size : (part + 2) * size])


@every_codec
def test_encoded_chunks_are_shorter_on_the_disk(written: Written, tmp_path: Path) -> None:
    [file] = tmp_path.iterdir()
    raw_bytes = len(written.slots) * written.tier.record_bytes
    assert file.stat().st_blocks * 512 < 0.95 * raw_bytes


@every_codec
def test_damage_to_an_encoded_unit_is_found_by_whole_and_part_reads_of_it_only(
    written: Written, tmp_path: Path
) -> None:
    [file] = tmp_path.iterdir()
    with file.open("r+b") as opened:
        opened.seek(2 * written.tier.record_bytes + PAGE_BYTES + 3)
        [byte] = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 4]))
    with pytest.raises(CorruptChunk, match=r"chunk 2 .* first of head 0 from token 0"):
        written.read()
    with pytest.raises(CorruptChunk, match="chunk 2 "):
        written.read_parts([2], [0], 1)
    written.read_parts([2, 1], [written.tier.parts_per_head, 0], 1)


@pytest.mark.parametrize("written", [("kivi4", 0.5)], indirect=True)
def test_raw_and_encoded_chunks_live_side_by_side(written: Written) -> None:
    assert {index for _, index in written.tier._headers} == {1, 3, 5}
    found, parts = written.read(), written.read_parts([0, 1], [3, 3], 1)
    size = written.tier.part_bytes
    for i in (0, 2, 4):
        assert torch.equal(found[i], written.source[i])
    for i in (0, 1):
        assert torch.equal(parts[i], found[i][3 * size : 4 * size])


@pytest.mark.parametrize("written", [("kivi2", 1.0)], indirect=True)
def test_slot_that_is_written_again_raw_is_raw(written: Written) -> None:
    choice = CodecChoice(128, find_codec("raw"))
    written.tier._io._choose = choice
    written.tier.write(written.slots, written.infos, written.source).wait(WAIT_S)
    assert all(map(torch.equal, written.read(), written.source))


def test_noise_that_no_lossless_codec_shortens_is_stored_raw(tmp_path: Path) -> None:
    with closing(open_tier(tmp_path, CodecChoice(128, find_codec("bf16x")))) as tier:
        slots, infos = tier.allocate(1), [ChunkInfo(0, 0, 0)]
        source = page_aligned(LAYOUT.slot_bytes).random_(0, 256)
        tier.write(slots, infos, [source]).wait(WAIT_S)
        out = page_aligned(LAYOUT.slot_bytes)
        tier.read(slots, infos, [out]).wait(WAIT_S)
        assert torch.equal(out, source)
        assert not tier._headers


def test_share_of_encoded_chunks_is_spread_evenly() -> None:
    choice = CodecChoice(64, find_codec("kivi4"), 0.3)
    encoded = [choice(ChunkInfo(i, 0, 64 * i)) is not None for i in range(100)]
    assert sum(encoded) == 30
    assert all(2 <= sum(encoded[i : i + 10]) <= 4 for i in range(90))
    choice.change(find_codec("kivi2"), 1.0)
    assert choice(ChunkInfo(0, 0, 0)) is find_codec("kivi2")
    choice.change(find_codec("raw"), 1.0)
    assert choice(ChunkInfo(0, 0, 0)) is None


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_share_beyond_all_or_nothing_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="not from 0 to 1"):
        CodecChoice(64, find_codec("kivi4"), share)
