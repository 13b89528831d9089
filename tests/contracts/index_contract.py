"""What every index must do. Not collected itself: subclass it as ``Test…``."""

import json
import math
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from offload.errors import ConfigError
from offload.index.base import Hits, KeyIndex
from offload.kernels.reference import merge
from offload.types import Partial


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_rows(num_heads: int, num_tokens: int, dim: int, seed: int) -> Tensor:
    """Rows that turn slowly, so that neighbours are alike: sums of a few slow waves."""
    waves = random_rows(num_heads, 6, dim, seed=seed)
    places = torch.arange(num_tokens) * (2 * math.pi / num_tokens)
    phases = torch.stack([(places * (1 + wave) + wave).cos() for wave in range(6)], 1)
    return phases @ waves


def exact_part(query: Tensor, keys: Tensor, values: Tensor, hits: Hits, have: Tensor) -> Partial:
    """Attention over the tokens that were found and read."""
    places = hits.ids.clamp_min(0).unsqueeze(-1)
    logits = query @ keys.float().take_along_dim(places, 1).mT
    logits = logits.masked_fill(~(have & hits.found).unsqueeze(1), -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
    return Partial(weights @ found_values(values, hits), lse)


def found_values(values: Tensor, hits: Hits) -> Tensor:
    return values.float().take_along_dim(hits.ids.clamp_min(0).unsqueeze(-1), 1)


def sparse_attention(
    index: KeyIndex, query: Tensor, keys: Tensor, values: Tensor, hits: Hits, have: Tensor
) -> Tensor:
    exact = exact_part(query, keys, values, hits, have)
    tail = index.tail(query, hits, have, found_values(values, hits))
    return exact.out if tail is None else merge([exact, tail]).out


def full_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys.float(), values.float(), scale=1.0
    )


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def with_needles(keys: Tensor, query: Tensor, tokens: list[int]) -> Tensor:
    """Turn the key at each of the tokens towards one of the queries; logits of about 20."""
    for number, token in enumerate(tokens):
        towards = query[:, number] / query[:, number].square().sum(-1, keepdim=True)
        keys[:, token] = 20 * towards
    return keys


class BlindIndexContract(ABC):
    """What holds even of an index that does not look at the query. Say how to build it.

    Attributes
    ----------
    has_tail : bool
        Subclass ``TailContract`` where it is true.
    derives : bool
        Besides its tensors it keeps what is derived from them.
    """

    has_tail: ClassVar[bool] = False
    derives: ClassVar[bool] = False

    @abstractmethod
    def build(self, keys: Tensor, values: Tensor) -> KeyIndex:
        """Return an index."""

    @pytest.mark.parametrize("budget", [0, 1, 7, 64, 400])
    @pytest.mark.parametrize("num_tokens", [1, 5, 63, 64, 333])
    def test_found_ids_are_distinct_tokens_in_range_within_the_budget(
        self, num_tokens: int, budget: int
    ) -> None:
        index = self.build(random_rows(3, num_tokens, 64), random_rows(3, num_tokens, 32))
        assert (index.num_heads, index.num_tokens) == (3, num_tokens)
        hits = index.search(random_rows(3, 2, 64, seed=1), budget)
        for row, found in zip(hits.ids, hits.found, strict=True):
            ids = row[found].tolist()
            assert len(ids) == len(set(ids)) <= budget
            assert set(ids) <= set(range(num_tokens))

    def test_groups_may_add_their_shares_instead_of_taking_the_largest(self) -> None:
        query = torch.cat([random_rows(2, 1, 64, seed=1), random_rows(2, 1, 64, seed=3)], 1)
        index = self.build(random_rows(2, 300, 64), random_rows(2, 300, 64))
        by_sum, by_max = (index.search(query, 100, group).ids for group in ("sum", "max"))
        assert by_sum.shape == by_max.shape
        one = query[:, :1]
        alone = [index.search(one, 100, group).ids.sort(1).values for group in ("sum", "max")]
        assert torch.equal(*alone)

    @pytest.mark.parametrize("more", [0, 9])
    @pytest.mark.parametrize("num_tokens", [1, 5, 63, 333, 1000])
    def test_budget_of_all_tokens_finds_every_token(self, num_tokens: int, more: int) -> None:
        index = self.build(random_rows(2, num_tokens, 64), random_rows(2, num_tokens, 64))
        hits = index.search(random_rows(2, 4, 64, seed=1), num_tokens + more)
        for row in hits.ids:
            assert sorted(row.tolist()) == list(range(num_tokens))

    def test_join_of_joined_parts_equals_one_join(self) -> None:
        parts = [self.build(random_rows(2, n, 64), random_rows(2, n, 64)) for n in (70, 33, 128)]
        at_once = type(parts[0]).join(parts)
        by_turns = type(parts[0]).join([type(parts[0]).join(parts[:2]), parts[2]])
        query = random_rows(2, 2, 64, seed=1)
        assert torch.equal(at_once.search(query, 50).ids, by_turns.search(query, 50).ids)

    @pytest.mark.parametrize("num_parts", [1, 2, 3])
    def test_prefix_is_the_join_of_the_first_parts(self, num_parts: int) -> None:
        parts = [self.build(random_rows(2, n, 64), random_rows(2, n, 64)) for n in (70, 33, 128)]
        first = type(parts[0]).join(parts[:num_parts])
        prefix = type(parts[0]).join(parts).prefix(first.num_tokens)
        assert prefix.num_tokens == first.num_tokens
        assert prefix.meta() == first.meta()
        for name, tensor in first.tensors().items():
            assert torch.equal(tensor, prefix.tensors()[name]), name

    @pytest.mark.parametrize("num_tokens", [1, 100, 1000])
    def test_restored_index_searches_and_estimates_as_the_original(self, num_tokens: int) -> None:
        keys, values = random_rows(2, num_tokens, 64), random_rows(2, num_tokens, 32, seed=1)
        index = self.build(keys, values)
        meta = json.loads(json.dumps(index.meta()))
        tensors = {name: tensor.clone() for name, tensor in index.tensors().items()}
        restored = type(index).restore(tensors, meta)
        assert (restored.num_heads, restored.num_tokens) == (2, num_tokens)
        assert restored.num_bytes == index.num_bytes
        query = random_rows(2, 3, 64, seed=2) / 4
        hits, again = index.search(query, 40), restored.search(query, 40)
        assert torch.equal(hits.ids, again.ids)
        assert hits.scanned_bytes == again.scanned_bytes
        out = sparse_attention(index, query, keys, values, hits, hits.found)
        assert torch.equal(out, sparse_attention(restored, query, keys, values, again, again.found))

    def test_restored_index_joins_with_a_new_one(self) -> None:
        keys, values = random_rows(2, 200, 64), random_rows(2, 200, 64, seed=1)
        old, new = (
            self.build(keys[:, :90], values[:, :90]),
            self.build(keys[:, 90:], values[:, 90:]),
        )
        restored = type(old).restore(old.tensors(), json.loads(json.dumps(old.meta())))
        query = random_rows(2, 2, 64, seed=2)
        expected = type(old).join([old, new]).search(query, 30).ids
        assert torch.equal(type(old).join([restored, new]).search(query, 30).ids, expected)

    def test_tensors_are_contiguous_and_add_up_to_the_bytes_of_the_index(self) -> None:
        parts = [self.build(random_rows(2, n, 64), random_rows(2, n, 64)) for n in (70, 33)]
        index = type(parts[0]).join(parts)
        assert all(tensor.is_contiguous() for tensor in index.tensors().values())
        num_bytes = sum(tensor.nbytes for tensor in index.tensors().values())
        assert 0 < num_bytes <= index.num_bytes
        assert (num_bytes < index.num_bytes) is self.derives

    def test_index_keeps_nothing_of_the_memory_it_was_built_from(self) -> None:
        keys, values = random_rows(2, 300, 64), random_rows(2, 300, 64, seed=1)
        index, query = self.build(keys, values), random_rows(2, 2, 64, seed=2)
        before = index.search(query, 30).ids
        keys.zero_()
        values.zero_()
        assert torch.equal(index.search(query, 30).ids, before)

    def test_index_of_rows_that_lie_apart_equals_one_of_contiguous_rows(self) -> None:
        rows = random_rows(2, 300, 160)
        keys, values = rows[..., :96], rows[..., 96:]
        query = random_rows(2, 2, 96, seed=2)
        apart = self.build(keys, values).search(query, 30).ids
        assert torch.equal(apart, self.build(keys.clone(), values.clone()).search(query, 30).ids)

    def test_concurrent_searches_equal_serial_ones(self) -> None:
        keys, values = random_rows(2, 600, 64), random_rows(2, 600, 64, seed=1)
        index = self.build(keys, values)
        queries = [random_rows(2, 2, 64, seed=seed) / 4 for seed in range(12)]
        ready = Barrier(4)

        def attend(query: Tensor) -> Tensor:
            hits = index.search(query, 50)
            return sparse_attention(index, query, keys, values, hits, hits.found)

        def attend_all(_: int) -> list[Tensor]:
            ready.wait(10)
            return [attend(query) for query in queries]

        with ThreadPoolExecutor(4) as pool:
            concurrent = list(pool.map(attend_all, range(4)))
        serial = torch.stack([attend(query) for query in queries])
        for outs in concurrent:
            assert torch.equal(torch.stack(outs), serial)

    @pytest.mark.parametrize("num_tokens", [1, 20, 333])
    @pytest.mark.parametrize(
        ("key_dim", "value_dim"), [(64, 64), (80, 64), (96, 128), (128, 20), (256, 256), (192, 128)]
    )
    def test_everything_found_and_read_is_full_attention_with_an_empty_tail(
        self, key_dim: int, value_dim: int, num_tokens: int
    ) -> None:
        keys = random_rows(2, num_tokens, key_dim)
        self._check_full_read(keys, random_rows(2, num_tokens, value_dim, seed=1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_everything_found_and_read_is_full_attention_in_any_dtype(
        self, dtype: torch.dtype
    ) -> None:
        keys, values = random_rows(2, 333, 128), random_rows(2, 333, 128, seed=1)
        self._check_full_read(keys.to(dtype), values.to(dtype))

    def _check_full_read(self, keys: Tensor, values: Tensor) -> None:
        index = self.build(keys, values)
        query = random_rows(2, 3, keys.shape[-1], seed=2) / 4
        hits = index.search(query, keys.shape[1])
        tail = index.tail(query, hits, hits.found, found_values(values, hits))
        assert (tail is not None) == self.has_tail
        if tail is not None:
            assert torch.equal(tail.lse, torch.full_like(tail.lse, -math.inf))
            assert torch.equal(tail.out, torch.zeros_like(tail.out))
        out = sparse_attention(index, query, keys, values, hits, hits.found)
        torch.testing.assert_close(out, full_attention(query, keys, values), atol=1e-5, rtol=1e-5)

    def test_equal_keys_give_the_mean_value(self) -> None:
        keys = random_rows(2, 1, 64).expand(2, 500, 64)
        values = 1 + random_rows(2, 500, 64, seed=1) / 3
        query = random_rows(2, 2, 64, seed=2) / 4
        index = self.build(keys, values)
        hits = index.search(query, 40)
        assert bool(hits.found.all())
        out = sparse_attention(index, query, keys, values, hits, hits.found)
        limit = 0.01 if self.has_tail else 0.1
        assert error(out, full_attention(query, keys, values)) < limit

    def test_keys_of_zeros_give_finite_output(self) -> None:
        keys, values = torch.zeros(2, 100, 64), torch.zeros(2, 100, 64)
        query = random_rows(2, 2, 64)
        index = self.build(keys, values)
        hits = index.search(query, 40)
        out = sparse_attention(index, query, keys, values, hits, hits.found)
        assert torch.equal(out, torch.zeros_like(out))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", ["key", "value"])
    def test_rows_that_are_not_finite_are_refused_naming_token_and_head(
        self, name: str, bad: float
    ) -> None:
        rows = {"key": random_rows(2, 9000, 32), "value": random_rows(2, 9000, 32)}
        rows[name][1, 8765, 5] = bad
        with pytest.raises(ConfigError, match=f"{name} of token 8765, head 1 is not finite"):
            self.build(rows["key"], rows["value"])


class IndexContract(BlindIndexContract):
    """What must hold of an index that looks at the query besides.

    Attributes
    ----------
    aligned_tokens : int
        Runs of a multiple of this join without a trace.
    """

    aligned_tokens: ClassVar[int]

    @pytest.mark.parametrize("last", [0, 100])
    def test_join_of_aligned_runs_equals_one_build(self, last: int) -> None:
        lengths = [self.aligned_tokens, 2 * self.aligned_tokens] + [last] * (last > 0)
        keys, values = random_rows(1, sum(lengths), 32), random_rows(1, sum(lengths), 32, seed=1)
        whole = self.build(keys, values)
        runs = zip(keys.split(lengths, 1), values.split(lengths, 1), strict=True)
        joined = type(whole).join([self.build(*run) for run in runs])
        assert joined.meta() == whole.meta()
        for name, tensor in whole.tensors().items():
            assert torch.equal(tensor, joined.tensors()[name]), name
        query = random_rows(1, 4, 32, seed=2) / 3
        assert torch.equal(joined.search(query, 200).ids, whole.search(query, 200).ids)

    @pytest.mark.parametrize("needle", [0, 69, 70, 102, 103, 230])
    def test_needle_in_joined_ragged_runs_is_found(self, needle: int) -> None:
        query = random_rows(2, 1, 64, seed=1)
        keys = with_needles(random_rows(2, 231, 64) / 10, query, [needle])
        parts = [self.build(run, run) for run in keys.split([70, 33, 128], 1)]
        joined = type(parts[0]).join(parts)
        assert joined.num_tokens == 231
        assert bool((joined.search(query, 64).ids == needle).any(1).all())

    @pytest.mark.parametrize("group", range(1, 9))
    def test_every_query_of_a_group_finds_its_own_needle(self, group: int) -> None:
        query = random_rows(2, group, 64, seed=1)
        needles = [40 + 101 * number for number in range(group)]
        keys = with_needles(random_rows(2, 1000, 64) / 10, query, needles)
        hits = self.build(keys, random_rows(2, 1000, 64)).search(query, 64 * group)
        for row in hits.ids:
            assert set(needles) <= set(row.tolist())

    def test_key_of_hundredfold_length_is_found_by_the_query_it_points_at(self) -> None:
        keys, query = random_rows(2, 1000, 64), random_rows(2, 4, 64, seed=1) / 4
        keys[:, 777] = 100 * query[:, 2] * 8 / query[:, 2].norm(dim=-1, keepdim=True)
        self._check_outlier(keys, query)

    @pytest.mark.parametrize("seed", range(6))
    def test_key_of_hundredfold_length_does_not_hide_a_needle(self, seed: int) -> None:
        query = random_rows(2, 1, 64, seed=seed) / 4
        keys = with_needles(random_rows(2, 1000, 64, seed=seed + 9) / 10, query, [300])
        length = 100 * keys[:, 300].norm(dim=-1, keepdim=True)
        keys[:, 777] = length * normalize(random_rows(2, 64, seed=seed), dim=-1)
        hits = self.build(keys, random_rows(2, 1000, 64)).search(query, 128)
        assert bool((hits.ids == 300).any(1).all())

    def _check_outlier(self, keys: Tensor, query: Tensor) -> None:
        values = random_rows(2, 1000, 64, seed=3)
        index = self.build(keys, values)
        hits = index.search(query, 40)
        assert bool((hits.ids == 777).any(1).all())
        out = sparse_attention(index, query, keys, values, hits, hits.found)
        wanted = full_attention(query, keys, values)
        assert error(out[:, 2], wanted[:, 2]) < 1e-5
        assert bool(torch.isfinite(out).all())


class TailContract(IndexContract):
    """What an index that estimates the rest must do besides."""

    has_tail = True

    @pytest.mark.parametrize("share_read", [0.0, 0.5, 1.0])
    def test_tail_of_smooth_data_makes_up_for_what_was_not_read(self, share_read: float) -> None:
        keys, values = smooth_rows(2, 4096, 64, seed=0), smooth_rows(2, 4096, 48, seed=1)
        query = random_rows(2, 4, 64, seed=2) / 2
        index = self.build(keys, values)
        hits = index.search(query, 200)
        have = random_rows(*hits.ids.shape, seed=3).argsort(1) < share_read * hits.ids.shape[1]
        out = sparse_attention(index, query, keys, values, hits, have)
        assert error(out, full_attention(query, keys, values)) < 0.04
