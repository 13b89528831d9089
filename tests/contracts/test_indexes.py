"""Every index keeps the contract, and does what its own method promises."""

import pytest
import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.index.base import KeyIndex
from offload.index.bounds import BoundsIndex
from offload.index.boxes import BLOCK_LEAVES
from offload.index.clusters import SEGMENT_TOKENS, ClusterIndex
from offload.index.heavy import HeavyIndex
from offload.index.mean import MeanIndex
from offload.index.residual import ResidualIndex
from offload.index.topk import TopKIndex
from offload.index.tree import TreeIndex
from tests.contracts.index_contract import (
    BlindIndexContract,
    IndexContract,
    TailContract,
    error,
    full_attention,
    random_rows,
)


class TestTopKIndex(TailContract):
    aligned_tokens = 64

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return TopKIndex.build(keys, values)

    def test_search_for_one_query_finds_the_keys_with_the_largest_logits(self) -> None:
        keys, query = random_rows(2, 500, 64), random_rows(2, 1, 64, seed=1)
        best = torch.bmm(query, keys.mT)[:, 0].topk(30, 1).indices
        found = self.build(keys, keys).search(query, 30).ids
        assert torch.equal(found.sort().values, best.sort().values)

    def test_lse_of_the_tail_is_exact(self) -> None:
        keys, values, query = (random_rows(2, n, 64, seed=n) for n in (500, 500, 3))
        index = self.build(keys, values)
        hits = index.search(query, 0)
        tail = index.tail(query, hits, hits.found, values[:, :0])
        assert tail is not None
        torch.testing.assert_close(tail.lse, torch.bmm(query, keys.mT).logsumexp(-1))

    def test_tail_with_means_of_single_tokens_is_full_attention(self) -> None:
        keys, values, query = (random_rows(2, n, 64, seed=n) for n in (500, 500, 3))
        index = TopKIndex.build(keys, values, chunk_tokens=1)
        hits = index.search(query, 0)
        tail = index.tail(query, hits, hits.found, values[:, :0])
        assert tail is not None
        torch.testing.assert_close(tail.out, full_attention(query, keys, values))


class TestRenormalisedTopKIndex(IndexContract):
    aligned_tokens = 64

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return TopKIndex.build(keys, values, renormalised=True)


class TestBoundsIndex(IndexContract):
    aligned_tokens = 16

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return BoundsIndex.build(keys, values)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("chunk_tokens", [1, 16, 24])
    def test_no_logit_of_a_chunk_exceeds_its_bound(
        self, chunk_tokens: int, dtype: torch.dtype
    ) -> None:
        keys, query = random_rows(2, 250, 64).to(dtype), random_rows(2, 4, 64, seed=1)
        index = BoundsIndex.build(keys, keys, chunk_tokens=chunk_tokens)
        bounds = index.bounds(query).repeat_interleave(chunk_tokens, 2)[..., :250]
        assert bool((torch.bmm(query, keys.float().mT) <= bounds + 1e-4).all())

    def test_bounds_of_single_tokens_are_their_logits(self) -> None:
        keys, query = random_rows(2, 50, 64), random_rows(2, 4, 64, seed=1)
        index = BoundsIndex.build(keys, keys, chunk_tokens=1)
        torch.testing.assert_close(index.bounds(query), torch.bmm(query, keys.mT))


class TestTreeIndex(IndexContract):
    derives = True
    aligned_tokens = 32

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return TreeIndex.build(keys, values, leaf_tokens=16)


class TestDeepTreeIndexOfCodes(IndexContract):
    derives = True
    aligned_tokens = 8 * BLOCK_LEAVES

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return TreeIndex.build(keys, values, leaf_tokens=8, num_levels=3, bits=8, patience=6)


class TestTreeIndexOfALayer(IndexContract):
    derives = True
    aligned_tokens = 8

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return TreeIndex.build(keys, values, leaf_tokens=8, scope="layer")


class TestMeanIndex(IndexContract):
    aligned_tokens = 16

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return MeanIndex.build(keys, values)

    @pytest.mark.parametrize(("is_cosine", "best"), [(False, 1), (True, 0)])
    def test_cosine_prefers_the_closer_chunk_and_dot_product_the_longer(
        self, is_cosine: bool, best: int
    ) -> None:
        query = torch.tensor([[[1.0, 0.0]]])
        keys = torch.tensor([[1.0, 0.0], [5.0, 5.0]]).repeat_interleave(16, 0).unsqueeze(0)
        found = MeanIndex.build(keys, keys, is_cosine=is_cosine).search(query, 16).ids
        assert sorted(found[0].tolist()) == list(range(16 * best, 16 * best + 16))

    def test_representatives_are_the_keys_most_like_the_others(self) -> None:
        keys = torch.tensor([[1.0, 0.0]] * 12 + [[0.0, 1.0]] * 4).unsqueeze(0)
        means = MeanIndex.build(keys, keys, representatives=4).means
        assert torch.equal(means, torch.tensor([[[1.0, 0.0]]]))


class TestCosineMeanIndex(IndexContract):
    aligned_tokens = 16

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return MeanIndex.build(keys, values, is_cosine=True)


class TestRepresentativeMeanIndex(IndexContract):
    aligned_tokens = 32

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return MeanIndex.build(keys, values, chunk_tokens=32, representatives=4)


class TestHeavyIndex(BlindIndexContract):
    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return HeavyIndex.build(keys, values)

    def test_last_keys_stand_in_for_queries_that_are_not_known(self) -> None:
        keys = random_rows(2, 300, 64)
        asked = HeavyIndex.build(keys, keys, queries=keys[:, -64:])
        assert torch.equal(HeavyIndex.build(keys, keys).scores, asked.scores)


class TestHeavyIndexOfQueries(BlindIndexContract):
    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return HeavyIndex.build(keys, values, queries=random_rows(len(keys), 9, keys.shape[2]))

    def test_search_finds_what_past_queries_attended_to_whatever_is_asked_now(self) -> None:
        past = random_rows(2, 3, 64, seed=5).repeat_interleave(50, 1)
        query = random_rows(2, 4, 64, seed=6)
        keys, heavy = random_rows(2, 900, 64) / 10, [13, 512, 899]
        for number, token in enumerate(heavy):
            towards = past[:, 50 * number]
            keys[:, token] = 400 * towards / towards.square().sum(-1, keepdim=True)
        light = query[:, 0]
        keys[:, 100] = 400 * light / light.square().sum(-1, keepdim=True)
        index = HeavyIndex.build(keys, keys, queries=past)
        for row in index.search(query, len(heavy)).ids:
            assert sorted(row.tolist()) == heavy

    def test_score_of_a_token_is_its_mean_share_of_the_attention_of_a_segment(self) -> None:
        keys, past = random_rows(2, 200, 64), random_rows(2, 150, 64, seed=5)
        parts = [HeavyIndex.build(run, run, queries=past) for run in keys.split(100, 1)]
        expected = [
            (past @ run.mT / 8).softmax(-1).mean(1, keepdim=True)[:, 0]
            for run in keys.split(100, 1)
        ]
        found = HeavyIndex.join(parts).scores
        torch.testing.assert_close(found, torch.cat(expected, 1))
        torch.testing.assert_close(found.sum(1), torch.full((2,), 2.0))


class TestClusterIndex(TailContract):
    aligned_tokens = SEGMENT_TOKENS

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return ClusterIndex.build(keys, values)

    def test_clusters_without_keys_take_no_share_of_a_query_s_softmax(self) -> None:
        keys = torch.tensor([[-9.0, 0.1], [-9.0, 0.0]]).repeat_interleave(50, 0).unsqueeze(0)
        index = ClusterIndex.build(keys, keys, tokens_per_cluster=10)
        assert int((index.clusters.counts == 0).sum()) > 0
        sure_of_the_first, unsure = [100.0, 300.0], [0.0, -1.0]
        found = index.search(torch.tensor([[sure_of_the_first, unsure]]), 50).ids
        assert sorted(found[0].tolist()) == list(range(50))


class TestOneBitResidualIndex(TailContract):
    aligned_tokens = SEGMENT_TOKENS

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return ResidualIndex.build(keys, values, num_bits=1)


class TestTwoBitResidualIndex(TailContract):
    aligned_tokens = SEGMENT_TOKENS

    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        return ResidualIndex.build(keys, values, num_bits=2)


@pytest.mark.parametrize("num_bits", [1, 2])
def test_tokens_of_equal_weight_are_estimated_without_bias(num_bits: int) -> None:
    keys, values = random_rows(2, 1, 64).expand(2, 500, 64), random_rows(2, 500, 64, seed=1)
    query = random_rows(2, 2, 64, seed=2) / 4
    index = ResidualIndex.build(keys, values, num_bits=num_bits)
    hits = index.search(query, 0)
    tail = index.tail(query, hits, hits.found, values[:, :0])
    assert tail is not None
    assert error(tail.out, full_attention(query, keys, values)) < 0.03


def test_scan_for_a_needle_is_not_lost_beside_a_key_with_almost_all_of_the_mass() -> None:
    keys, query = random_rows(4, 2000, 64) / 10, random_rows(4, 1, 64, seed=1)
    needle = 20 * query[:, 0] / query[:, 0].square().sum(-1, keepdim=True)
    keys[:, 1500] = needle
    keys[:, 1900] = 100 * needle + 300 * random_rows(4, 64, seed=2)
    assert bool((query[:, 0] * keys[:, 1900]).sum(-1).min() > 200)
    index = ResidualIndex.build(keys, keys, scan=0.05)
    hits = index.search(query, 40)
    for row in hits.ids:
        assert {1500, 1900} <= set(row.tolist())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            TopKIndex.build(random_rows(1, 9, 8), random_rows(1, 9, 8)),
            TopKIndex.build(random_rows(1, 9, 8), random_rows(1, 9, 8), renormalised=True),
        ),
        (
            BoundsIndex.build(random_rows(1, 9, 8), random_rows(1, 9, 8)),
            BoundsIndex.build(random_rows(1, 9, 8), random_rows(1, 9, 8), chunk_tokens=8),
        ),
        (
            MeanIndex.build(random_rows(1, 9, 8), random_rows(1, 9, 8)),
            MeanIndex.build(random_rows(1, 9, 8), random_rows(1, 9, 8), representatives=2),
        ),
        (
            ResidualIndex.build(random_rows(1, 9, 8), random_rows(1, 9, 8)),
            ResidualIndex.build(random_rows(1, 9, 8), random_rows(1, 9, 8), num_bits=1),
        ),
    ],
    ids=lambda index: type(index).__name__,
)
def test_join_of_parts_with_different_options_is_refused(one: KeyIndex, other: KeyIndex) -> None:
    with pytest.raises(ConfigError, match="differ in their options"):
        type(one).join([one, other])
