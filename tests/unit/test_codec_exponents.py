"""Where exponents are compressed, where rows stay as they are, and what no frame may claim."""

import numpy as np
import pytest
import torch
import zstandard
from torch import Tensor

from offload.errors import CorruptChunk
from offload.tiers.codec_exponents import PLANES, RAW, ExponentCodec, Words, join, split
from offload.tiers.codecs import Unit

CODEC = ExponentCodec()


def make_rows(dtype: torch.dtype) -> tuple[Tensor, Unit]:
    generator = torch.Generator().manual_seed(0)
    rows = (
        torch.randn(1, 64, 256, generator=generator) * torch.randn(256, generator=generator).exp()
    )
    return rows.to(dtype), Unit(64, 128, 128, dtype)


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.bfloat16, 1.43), (torch.float16, 1.15), (torch.float32, 1.18)]
)
def test_normal_numbers_become_smaller_by_their_exponents(dtype: torch.dtype, least: float) -> None:
    rows, unit = make_rows(dtype)
    [payload] = CODEC.encode(rows, unit)
    assert payload[0] == PLANES
    assert unit.num_bytes / len(payload) > least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8])
def test_noise_stays_as_it_is_behind_one_byte(dtype: torch.dtype) -> None:
    unit = Unit(64, 128, 128, dtype)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (unit.num_bytes,), generator=generator).to(torch.uint8)
    [payload] = CODEC.encode(noise.view(dtype).view(1, *unit.shape), unit)
    assert payload == bytes([RAW]) + noise.numpy().tobytes()


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.uint64])
def test_high_bytes_are_exponents_below_the_largest_of_their_channel(kind: type) -> None:
    size = np.dtype(kind).itemsize
    numbers = np.array([[1.0, -8.0], [0.5, 4.0]])
    words: Words = (numbers.astype(np.float64).view(np.uint64) >> (64 - 8 * size)).astype(kind)
    high, low = split(words)
    assert high[0].tolist() == [int(word) >> (8 * size - 9) & 255 for word in words[0]]
    assert (high[1:] == high[0] - (words >> (8 * size - 9) & 255).astype(np.uint8)).all()
    out = np.empty_like(words)
    join(high, low, out)
    assert (out == words).all()


def test_frame_that_claims_more_than_a_unit_is_corrupt_before_room_is_made() -> None:
    rows, unit = make_rows(torch.bfloat16)
    [payload] = CODEC.encode(rows, unit)
    huge = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    bad = memoryview(payload[: 1 + unit.num_bytes // 2] + huge)
    with pytest.raises(CorruptChunk, match="a frame of 16777216 bytes, not 16640"):
        CODEC.decode([bad], unit, torch.empty_like(rows))


def test_second_frame_after_the_first_is_corrupt() -> None:
    rows, unit = make_rows(torch.bfloat16)
    [payload] = CODEC.encode(rows, unit)
    bad = memoryview(payload + zstandard.ZstdCompressor().compress(b"more"))
    with pytest.raises(CorruptChunk, match="are no zstd frame"):
        CODEC.decode([bad], unit, torch.empty_like(rows))


def test_planes_of_elements_of_one_byte_are_corrupt() -> None:
    unit = Unit(4, 8, 8, torch.int8)
    out = torch.empty(1, *unit.shape, dtype=torch.int8)
    with pytest.raises(CorruptChunk, match="mode 1, elements of 1 bytes"):
        CODEC.decode([memoryview(bytes([PLANES]) + bytes(64))], unit, out)
