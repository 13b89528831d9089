"""The approximate indexes keep the contract, with runs of 512 keys and short beams.

So what the contract asks of 600 keys and more is answered by graphs and by joined indexes.
"""

import pytest
import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.index.ann import AnnIndex
from offload.index.base import KeyIndex
from offload.index.faiss_kinds import KINDS
from offload.index.projection import ProjectionIndex
from tests.contracts.index_contract import IndexContract, random_rows

RUN = 512


class TestInvertedFile(IndexContract):
    aligned_tokens = RUN

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return AnnIndex.build(keys, values, kind="ivf", segment_tokens=RUN)


class TestInvertedFileOfCodes(IndexContract):
    aligned_tokens = RUN

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return AnnIndex.build(keys, values, kind="ivf_rabitq", segment_tokens=RUN)


class TestProductQuantisation(IndexContract):
    aligned_tokens = RUN

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return AnnIndex.build(keys, values, kind="pq", segment_tokens=RUN)


class TestSmallWorldGraph(IndexContract):
    aligned_tokens = RUN

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return AnnIndex.build(keys, values, kind="hnsw", segment_tokens=RUN)


class TestProjectionIndex(IndexContract):
    aligned_tokens = RUN

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        queries = random_rows(keys.shape[0], 300, keys.shape[2], seed=77)
        return ProjectionIndex.build(keys, values, queries=queries, segment_tokens=RUN, beam=64)


class TestProjectionIndexWithoutQueries(IndexContract):
    aligned_tokens = RUN

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return ProjectionIndex.build(keys, values, segment_tokens=RUN, beam=64)


@pytest.mark.parametrize("kind", KINDS)
def test_join_of_another_kind_is_refused(kind: str) -> None:
    rows = random_rows(1, 40, 8)
    other = KINDS[KINDS.index(kind) - 1]
    parts = [AnnIndex.build(rows, rows, kind=name) for name in (kind, other)]
    with pytest.raises(ConfigError, match="differ in their options"):
        AnnIndex.join(parts)


def test_join_of_graphs_of_another_degree_is_refused() -> None:
    rows = random_rows(1, 40, 8)
    parts = [ProjectionIndex.build(rows, rows, degree=degree) for degree in (8, 16)]
    with pytest.raises(ConfigError, match="differ in their options"):
        ProjectionIndex.join(parts)


def test_graph_of_a_device_s_dtype_searches_in_float32() -> None:
    keys, query = random_rows(2, 900, 64), random_rows(2, 3, 64, seed=1)
    narrow = ProjectionIndex.build(keys.bfloat16(), keys, beam=64)
    wide = ProjectionIndex.build(keys.bfloat16().float(), keys, beam=64)
    assert narrow.keys.dtype == torch.bfloat16
    assert torch.equal(narrow.search(query, 50).ids, wide.search(query, 50).ids)
