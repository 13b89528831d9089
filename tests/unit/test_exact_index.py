"""The exact index leaves out nothing that a query can see, and no more than whole chunks."""

import pytest

from offload.index.exact import visible_chunks


@pytest.mark.parametrize("num_chunks", [0, 1, 7])
def test_visible_chunks_without_a_window_are_all(num_chunks: int) -> None:
    assert visible_chunks(num_chunks, 4, 100, None) == range(num_chunks)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5])
@pytest.mark.parametrize("window", [1, 2, 4, 9, 40])
@pytest.mark.parametrize("first_query", [0, 3, 20, 21, 24])
def test_visible_chunks_with_a_window_are_those_with_a_visible_key(
    chunk_tokens: int, window: int, first_query: int
) -> None:
    num_chunks = 20 // chunk_tokens
    seen = {
        key // chunk_tokens
        for key in range(num_chunks * chunk_tokens)
        if key > first_query - window
    }
    assert set(visible_chunks(num_chunks, chunk_tokens, first_query, window)) == seen
