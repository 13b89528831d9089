"""Bits by importance: who is stored in how many."""

import pytest

from offload.tiers.codec_importance import CodecByImportance
from offload.types import ChunkId, ChunkInfo

MASSES = {ChunkId(number): 0.01 * (number + 1) for number in range(1, 9)}
"""Chunks 1 to 8, the more the higher; chunk 0 gets nothing."""


def name_of(choice: CodecByImportance, chunk: int) -> str:
    codec = choice(ChunkInfo(chunk, 0, 0))
    return "raw" if codec is None else codec.name


def names(choice: CodecByImportance, *chunks: int) -> list[str]:
    return [name_of(choice, chunk) for chunk in chunks]


def test_chunks_of_which_nothing_is_known_take_eight_bits() -> None:
    choice = CodecByImportance()
    assert names(choice, 0, 7) == ["int8", "int8"]
    choice.observe({})
    assert names(choice, 0) == ["int8"]
    choice.observe(MASSES)
    assert names(choice, 9, 1000) == ["int8", "int8"]


@pytest.mark.parametrize("rounds", [1, 20])
def test_more_attention_takes_more_bits_and_none_takes_fewest(rounds: int) -> None:
    choice = CodecByImportance()
    for _ in range(rounds):
        choice.observe(MASSES)
    assert names(choice, 0, 1, 2) == ["kivi2"] * 3
    assert names(choice, 3, 4, 5, 6) == ["kivi4"] * 4
    assert names(choice, 7, 8) == ["raw"] * 2


def test_attention_that_moves_on_is_forgotten() -> None:
    choice = CodecByImportance()
    choice.observe(MASSES)
    for _ in range(200):
        choice.observe({ChunkId(1): 0.3, ChunkId(2): 0.2})
    assert names(choice, 8, 3) == ["kivi2", "kivi2"]
    assert names(choice, 1) == ["raw"]


def test_all_alike_are_stored_raw_rather_than_in_few_bits() -> None:
    choice = CodecByImportance()
    choice.observe(dict.fromkeys(MASSES, 0.1))
    assert set(names(choice, *MASSES)) == {"raw"}
