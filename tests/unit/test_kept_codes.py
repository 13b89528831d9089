"""Codes that go from the host to the disk arrive as they are, if the disk encodes alike."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.tiers.codec_choice import CodecChoice
from offload.tiers.codec_fixed import FIXED, find_fixed, slot_bytes_of, unit_of
from offload.tiers.codec_ladder import CODECS, find_codec
from offload.tiers.coded import CodedTier
from offload.tiers.disk import DiskTier
from offload.tiers.kept_codes import KeptCodes
from offload.tiers.pool import as_chunk, page_aligned
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout

LAYOUT = ChunkLayout(2, 64, 64, 64, torch.float16)
"""In bfloat16 and float32 what was decoded becomes the same codes again anyway."""

NUM = 4
INFOS = [ChunkInfo(i, 3, 64 * i) for i in range(NUM)]
WAIT_S = 30.0


def buffers(num: int = NUM) -> list[Tensor]:
    return list(page_aligned(num * LAYOUT.slot_bytes).view(num, -1))


def chunks_of(contents: list[Tensor]) -> Tensor:
    return torch.stack([as_chunk(content, LAYOUT) for content in contents])


def send_down(host: str, disk: str, directory: Path, most: int = NUM) -> tuple[Tensor, Tensor]:
    """Return chunks as the host reads them, and as the disk does after they went there."""
    kept = KeptCodes(CodecChoice(64, find_codec(disk)), most)
    codec = find_fixed(host)
    coded = CodedTier(
        "cpu",
        capacity_bytes=NUM * slot_bytes_of(codec, LAYOUT),
        layout=LAYOUT,
        codec=codec,
        kept=kept,
    )
    below = DiskTier(
        directory,
        capacity_bytes=NUM * (PAGE_BYTES + LAYOUT.slot_bytes),
        layout=LAYOUT,
        choose_codec=kept,
    )
    source, above, on_disk = buffers(), buffers(), buffers()
    for i, chunk in enumerate(source):
        rows = torch.randn(LAYOUT.shape, generator=torch.Generator().manual_seed(i))
        as_chunk(chunk, LAYOUT).copy_(rows)
    slots = coded.allocate(NUM)
    coded.write(slots, INFOS, source).wait()
    for slot, info, out in zip(slots, INFOS, above, strict=True):
        coded.hand_over(slot, info, out)
    places = below.allocate(NUM)
    below.write(places, INFOS, above).wait(WAIT_S)
    below.read(places, INFOS, on_disk).wait(WAIT_S)
    below.close()
    coded.close()
    return chunks_of(above), chunks_of(on_disk)


@pytest.mark.parametrize("name", FIXED)
def test_chunk_that_goes_to_a_disk_with_the_same_codec_loses_nothing_more(
    name: str, tmp_path: Path
) -> None:
    above, below = send_down(name, name, tmp_path)
    assert torch.equal(above, below)


@pytest.mark.parametrize("disk", [name for name, codec in CODECS.items() if codec.is_lossless])
def test_lossless_disk_stores_what_the_codes_decode_to(disk: str, tmp_path: Path) -> None:
    above, below = send_down("kivi4", disk, tmp_path)
    assert torch.equal(above, below)


def test_disk_with_another_codec_encodes_what_the_codes_decode_to(tmp_path: Path) -> None:
    above, below = send_down("kivi4", "kivi2", tmp_path)
    codec, unit = find_codec("kivi2"), unit_of(LAYOUT)
    expected = torch.empty_like(above)
    payloads = codec.encode(above.view(-1, *unit.shape), unit)
    codec.decode([memoryview(each) for each in payloads], unit, expected.view(-1, *unit.shape))
    assert torch.equal(below, expected)
    assert not torch.equal(below, above)


def test_chunks_beyond_the_most_that_are_kept_are_encoded_again(tmp_path: Path) -> None:
    above, below = send_down("int8", "int8", tmp_path, most=1)
    assert torch.equal(above[-1], below[-1])
    assert not torch.equal(above[0], below[0])
    torch.testing.assert_close(above, below, rtol=0, atol=0.01)
