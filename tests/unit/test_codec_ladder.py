"""Codecs by name and by number, which records on disk rely on."""

import pytest

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.codec_ladder import CODECS, codec_of, find_codec

NUMBERS = {"raw": 0, "bf16x": 1, "int8": 2, "fp8": 3, "kivi4": 4, "kivi2": 5}
"""As written to disk: none may ever change."""


def test_numbers_of_codecs_are_those_on_disk() -> None:
    assert {name: codec.number for name, codec in CODECS.items()} == NUMBERS


@pytest.mark.parametrize("name", NUMBERS)
def test_codec_is_found_by_its_name_and_by_its_number(name: str) -> None:
    codec = find_codec(name)
    assert codec.name == name
    assert codec_of(codec.number) is codec
    assert codec.is_lossless == (name in {"raw", "bf16x"})


def test_unknown_name_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'zip'; there are raw, bf16x, int8, fp8, kivi4, kivi2"):
        find_codec("zip")


@pytest.mark.parametrize("number", [-1, 6, 255])
def test_unknown_number_is_corrupt(number: int) -> None:
    with pytest.raises(CorruptChunk, match=rf"codec number {number}; there are 0 raw"):
        codec_of(number)
