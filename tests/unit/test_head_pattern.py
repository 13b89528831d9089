"""Which heads stream."""

from pathlib import Path
from typing import Any

import pytest
import torch

from offload.errors import ConfigError
from offload.sparse.head_pattern import as_streaming_heads, read_head_pattern

GATES = "0.9\t0.1\n0.4\t0.6\n"


def test_gates_below_the_threshold_stream(tmp_path: Path) -> None:
    file = tmp_path / "full_attention_heads.tsv"
    file.write_text(GATES)
    assert read_head_pattern(file) == ((False, True), (True, False))
    assert as_streaming_heads(file) == ((False, True), (True, False))
    assert read_head_pattern(file, threshold=0.95) == ((True, True), (True, True))


@pytest.mark.parametrize(("sparsity", "count"), [(0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4)])
def test_sparsity_is_the_share_of_heads_with_the_lowest_gates(
    sparsity: float, count: int, tmp_path: Path
) -> None:
    file = tmp_path / "gates.tsv"
    file.write_text(GATES)
    pattern = read_head_pattern(file, sparsity=sparsity)
    assert sum(map(sum, pattern)) == count
    assert count == 0 or pattern[0][1]


def test_tensor_of_booleans_is_a_pattern() -> None:
    assert as_streaming_heads(torch.tensor([[True, False]])) == ((True, False),)


@pytest.mark.parametrize("text", ["", "a b\n", "1 2\n3\n", "nan 1\n"])
def test_file_that_is_no_table_of_gates_is_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "gates.tsv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"gates\.tsv"):
        read_head_pattern(file)


@pytest.mark.parametrize("pattern", [[], [[]], [[1, 0]], [[True], [True, False]], torch.ones(2)])
def test_what_is_no_table_of_booleans_is_refused(pattern: Any) -> None:
    with pytest.raises(ConfigError, match="streaming_heads"):
        as_streaming_heads(pattern)


def test_sparsity_beyond_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gates.tsv").write_text(GATES)
    with pytest.raises(ConfigError, match=r"sparsity=1\.5"):
        read_head_pattern(tmp_path / "gates.tsv", sparsity=1.5)
