"""The host tier that encodes keeps the contract of a tier, but for what its codec loses."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from offload.errors import CapacityError, ConfigError
from offload.tiers.codec_fixed import FIXED, find_fixed, unit_of
from offload.tiers.codec_ladder import CODECS, find_codec
from offload.tiers.coded import CodedTier
from offload.tiers.pool import as_chunk, page_aligned
from offload.types import ChunkLayout
from tests.contracts.tier_contract import (
    WAIT_S,
    WHOLE_PAGES,
    TierContract,
    make_buffers,
    make_infos,
)

LAYOUTS = {
    "heads of 64": ChunkLayout(2, 64, 64, 64, torch.bfloat16),
    "two units of a head": ChunkLayout(2, 128, 32, 32, torch.float16),
    "odd heads": ChunkLayout(3, 20, 13, 29, torch.float32),
    "values unlike keys": ChunkLayout(2, 64, 48, 80, torch.float32),
    "latents": ChunkLayout(1, 64, 96, 16, torch.bfloat16),
}

every_codec = pytest.mark.parametrize("name", FIXED)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))


def make_tier(name: str, num_slots: int, layout: ChunkLayout) -> CodedTier:
    probe = CodedTier("cpu", capacity_bytes=0, layout=layout, codec=find_fixed(name))
    size = num_slots * probe.slot_bytes
    return CodedTier("cpu", capacity_bytes=size, layout=layout, codec=find_fixed(name))


def decoded(name: str, chunks: list[Tensor], layout: ChunkLayout) -> list[Tensor]:
    """Return what a codec of the ladder, whose payloads these are too, leaves of chunks."""
    codec, unit, found = find_codec(name), unit_of(layout), []
    for chunk in chunks:
        rows = as_chunk(chunk, layout).view(-1, *unit.shape)
        found.append(page_aligned(layout.slot_bytes))
        payloads = [memoryview(payload) for payload in codec.encode(rows, unit)]
        codec.decode(payloads, unit, as_chunk(found[-1], layout).view(-1, *unit.shape))
    return found


def draw_chunks(count: int, layout: ChunkLayout, seed: int = 1) -> list[Tensor]:
    """Return chunks of normal numbers."""
    chunks, generator = make_buffers(count, layout), torch.Generator().manual_seed(seed)
    for chunk in chunks:
        as_chunk(chunk, layout).copy_(torch.randn(layout.shape, generator=generator))
    return chunks


class CodedContract(TierContract):
    codec: ClassVar[str]

    def make_tier(self, num_slots: int, layout: ChunkLayout) -> CodedTier:
        return make_tier(self.codec, num_slots, layout)

    def stored(self, chunks: list[Tensor], layout: ChunkLayout) -> list[Tensor]:
        return decoded(self.codec, chunks, layout)


class TestInt8Tier(CodedContract):
    codec = "int8"


class TestFloat8Tier(CodedContract):
    codec = "fp8"


class TestKivi4Tier(CodedContract):
    codec = "kivi4"


class TestKivi2Tier(CodedContract):
    codec = "kivi2"


@every_layout
@every_codec
def test_chunk_that_was_written_is_what_its_codec_decodes(name: str, layout: ChunkLayout) -> None:
    tier, chunks = make_tier(name, 3, layout), draw_chunks(3, layout)
    slots, out = tier.allocate(3), make_buffers(3, layout)
    tier.write(slots, make_infos(3), chunks).wait(WAIT_S)
    tier.read(slots, make_infos(3), out).wait(WAIT_S)
    for found, expected in zip(out, decoded(name, chunks, layout), strict=True):
        assert torch.equal(as_chunk(found, layout), as_chunk(expected, layout))
    together = tier.decoded(np.array([slots]))
    assert torch.equal(together, torch.stack([as_chunk(each, layout) for each in out])[None])
    tier.close()


@every_layout
@every_codec
def test_rows_are_those_of_the_decoded_chunks(name: str, layout: ChunkLayout) -> None:
    tier, slots = make_tier(name, 4, layout), np.arange(4)
    tier.write(tier.allocate(4), make_infos(4), draw_chunks(4, layout)).wait(WAIT_S)
    draw = np.random.default_rng(3)
    some = draw.integers(0, 4, 50)
    lines = draw.integers(0, layout.num_kv_heads * layout.chunk_tokens, 50)
    rows = torch.from_numpy(tier.read_rows(some, lines)).view(layout.dtype)
    expected = tier.decoded(slots).view(4, -1, layout.row_dim)[some, lines]
    assert torch.equal(rows, expected)
    tier.close()


@every_codec
def test_slot_is_smaller_than_a_chunk_and_capacity_counts_codes(name: str) -> None:
    layout = ChunkLayout(8, 64, 128, 128, torch.bfloat16)
    tier = CodedTier("cpu", capacity_bytes=1 << 26, layout=layout, codec=find_fixed(name))
    ratio = {"int8": 1.93, "fp8": 1.99, "kivi4": 3.18, "kivi2": 5.27}[name]
    assert layout.chunk_bytes / tier.slot_bytes == pytest.approx(ratio, abs=0.01)
    assert tier.num_slots == (1 << 26) // tier.slot_bytes
    slots = tier.allocate(tier.num_slots)
    assert tier.used_bytes == len(slots) * tier.slot_bytes <= tier.capacity_bytes
    with pytest.raises(
        CapacityError, match=f"cpu tier full: 1 slots requested, 0 free of {len(slots)} "
    ):
        tier.allocate(1)
    tier.close()


@pytest.mark.parametrize(
    "name", [*sorted(set(CODECS) - set(FIXED)), "auto", "importance", "zip", 4, None]
)
def test_codec_without_a_fixed_rate_is_refused_with_those_that_have_one(name: object) -> None:
    with pytest.raises(ConfigError, match=r"no fixed rate.*int8, fp8, kivi4, kivi2"):
        find_fixed(name)


@every_codec
def test_dtype_that_codecs_do_not_take_is_refused(name: str) -> None:
    layout = ChunkLayout(2, 64, 64, 64, torch.float64)
    with pytest.raises(
        ConfigError, match=f"{name} encodes float32, float16, bfloat16, not float64"
    ):
        make_tier(name, 1, layout)


def test_codes_that_are_no_smaller_than_the_chunk_are_refused() -> None:
    layout = ChunkLayout(64, 1, 16, 16, torch.bfloat16)
    with pytest.raises(ConfigError, match="int8 makes 8192 bytes of chunks that take 4096"):
        make_tier("int8", 1, layout)


@every_codec
def test_numbers_that_are_not_finite_come_back(name: str) -> None:
    layout = WHOLE_PAGES
    tier, [chunk] = make_tier(name, 1, layout), draw_chunks(1, layout)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])
    as_chunk(chunk, layout)[1, 3, :3] = special
    [slot], [out] = tier.allocate(1), make_buffers(1, layout)
    tier.write([slot], make_infos(1), [chunk]).wait(WAIT_S)
    tier.read([slot], make_infos(1), [out]).wait(WAIT_S)
    found = as_chunk(out, layout)
    assert torch.equal(found[1, 3, :3].isnan(), special.isnan())
    assert torch.equal(found[1, 3, 1:3].float(), special[1:])
    assert int((~found.isfinite()).sum()) == 3
    tier.close()
