"""Objects of chunks: any damage is noticed, and each chunk can be read by itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.remote_block import BlockFormat, decode_frame, pack_block, parse_header

KEY = bytes(range(32))
FORMAT = BlockFormat(b"model", 3, 4096, 2)


def make_chunks(fmt: BlockFormat = FORMAT) -> list[NDArray[np.uint8]]:
    """Return numbers that compress in planes, noise, and zeros."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal(fmt.chunk_bytes // 2).astype(np.float16).view(np.uint8)
    noise = rng.integers(0, 256, fmt.chunk_bytes, np.uint8)
    return [normal, noise, np.zeros(fmt.chunk_bytes, np.uint8)]


def read_all(content: bytes, fmt: BlockFormat = FORMAT, key: bytes = KEY) -> list[bytes]:
    frames = parse_header(content[: fmt.header_bytes], fmt, key, "object")
    out = np.empty((len(frames), fmt.chunk_bytes), np.uint8)
    for frame, chunk in zip(frames, out, strict=True):
        part = content[frame.start : frame.start + frame.num_bytes]
        decode_frame(frame, part, fmt, chunk, "chunk")
    return [chunk.tobytes() for chunk in out]


@pytest.mark.parametrize("compress", [True, False])
def test_chunks_come_back_as_they_were(compress: bool) -> None:
    chunks = make_chunks()
    content = pack_block(FORMAT, KEY, chunks, compress=compress)
    assert read_all(content) == [chunk.tobytes() for chunk in chunks]
    assert len(content) <= FORMAT.most_bytes
    assert (len(content) == FORMAT.most_bytes) is not compress


def test_noise_is_stored_as_it_is_and_numbers_in_planes() -> None:
    content = pack_block(FORMAT, KEY, make_chunks(), compress=True)
    frames = parse_header(content[: FORMAT.header_bytes], FORMAT, KEY, "object")
    assert [frame.num_bytes < 4096 for frame in frames] == [True, False, True]
    assert frames[-1].num_bytes < 64


@given(st.data())
def test_any_flipped_bit_is_noticed(data: st.DataObject) -> None:
    content = bytearray(pack_block(FORMAT, KEY, make_chunks(), compress=True))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CorruptChunk):
        read_all(bytes(content))


@given(st.integers(0, 4000))
def test_any_end_that_is_missing_is_noticed(kept: int) -> None:
    content = pack_block(FORMAT, KEY, make_chunks(), compress=True)
    assert kept < len(content)
    with pytest.raises(CorruptChunk):
        read_all(content[:kept])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": b"other"}, "model should be"),
        ({"chunk_bytes": 4098}, "chunk bytes should be"),
        ({"element_bytes": 4}, "element bytes should be"),
        ({"num_frames": 2}, "header"),
    ],
)
def test_object_of_another_format_is_refused(changes: dict[str, int], words: str) -> None:
    content = pack_block(FORMAT, KEY, make_chunks(), compress=True)
    values = {name: getattr(FORMAT, name) for name in FORMAT.__dataclass_fields__}
    with pytest.raises(CorruptChunk, match=words):
        read_all(content, BlockFormat(**{**values, **changes}))


def test_object_of_another_key_is_refused() -> None:
    content = pack_block(FORMAT, KEY, make_chunks(), compress=False)
    with pytest.raises(CorruptChunk, match="key should be"):
        read_all(content, key=bytes(32))


@pytest.mark.parametrize("arguments", [(bytes(17), 1, 8, 2), (b"", 0, 8, 2), (b"", 1 << 17, 8, 2)])
def test_format_that_no_header_can_hold_is_refused(arguments: tuple[bytes, int, int, int]) -> None:
    with pytest.raises(ConfigError, match="at most"):
        BlockFormat(*arguments)
