"""An index is searched by some threads while others join it, cut it and build parts to add."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier, Event
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from offload.index.ann import AnnIndex
from offload.index.base import KeyIndex
from offload.index.bounds import BoundsIndex
from offload.index.clusters import ClusterIndex
from offload.index.mean import MeanIndex
from offload.index.projection import ProjectionIndex
from offload.index.residual import ResidualIndex
from offload.index.topk import TopKIndex
from offload.index.tree import TreeIndex
from tests.contracts.index_contract import random_rows, sparse_attention

Build = Callable[[Tensor, Tensor], KeyIndex]

INDEXES: dict[str, Build] = {
    "adaptive": ResidualIndex.build,
    "clusters": ClusterIndex.build,
    "bounds": BoundsIndex.build,
    "tree": partial(TreeIndex.build, leaf_tokens=8),
    "tree of codes": partial(TreeIndex.build, leaf_tokens=8, num_levels=3, bits=8),
    "mean": MeanIndex.build,
    "oracle": TopKIndex.build,
    "projection": ProjectionIndex.build,
    "ivf": partial(AnnIndex.build, kind="ivf"),
    "hnsw": partial(AnnIndex.build, kind="hnsw"),
}
PART_TOKENS, NUM_PARTS = 256, 5
WAIT_S = 30.0

every_index = pytest.mark.parametrize("build", INDEXES.values(), ids=INDEXES)


class Answer(NamedTuple):
    """What one query got."""

    ids: Tensor
    out: Tensor


KEYS = random_rows(2, PART_TOKENS * NUM_PARTS, 32)
VALUES = random_rows(2, PART_TOKENS * NUM_PARTS, 32, seed=1)
QUERIES = [random_rows(2, 2, 32, seed=10 + seed) / 3 for seed in range(6)]


def part(build: Build, number: int) -> KeyIndex:
    rows = slice(number * PART_TOKENS, (number + 1) * PART_TOKENS)
    return build(KEYS[:, rows], VALUES[:, rows])


def ask(index: KeyIndex) -> list[Answer]:
    keys, values = KEYS[:, : index.num_tokens], VALUES[:, : index.num_tokens]
    answers = []
    for query in QUERIES:
        hits = index.search(query, 24)
        out = sparse_attention(index, query, keys, values, hits, hits.found)
        answers.append(Answer(hits.ids, out))
    return answers


def check_equal(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.out, other.out)


@every_index
def test_searches_during_joins_equal_searches_of_a_quiet_index(build: Build) -> None:
    parts = [part(build, number) for number in range(NUM_PARTS)]
    first, everything = parts[0], type(parts[0]).join(parts)
    quiet, quiet_all = ask(first), ask(everything)
    together, stop = Barrier(3), Event()

    def search() -> list[list[Answer]]:
        """Ask until the joins are done, and once more."""
        together.wait(WAIT_S)
        rounds = [ask(first)]
        while not stop.is_set():
            rounds.append(ask(first))
        return [*rounds, ask(first)]

    def grow() -> list[KeyIndex]:
        together.wait(WAIT_S)
        grown = [first]
        for number in range(1, NUM_PARTS):
            grown.append(type(first).join([grown[-1], part(build, number)]))
        return grown

    with ThreadPoolExecutor(3) as pool:
        searches = [pool.submit(search) for _ in range(2)]
        growth = pool.submit(grow)
        growth.exception()
        stop.set()
        for future in searches:
            rounds = future.result()
            assert len(rounds) >= 2
            for answers in rounds:
                check_equal(answers, quiet)
    check_equal(ask(growth.result()[-1]), quiet_all)


@every_index
def test_joins_of_every_length_are_searched_at_once(build: Build) -> None:
    parts = [part(build, number) for number in range(NUM_PARTS)]
    joins = [type(parts[0]).join(parts[:count]) for count in range(1, NUM_PARTS + 1)]
    expected = [ask(index) for index in joins]
    together = Barrier(NUM_PARTS)

    def search(index: KeyIndex) -> list[Answer]:
        together.wait(WAIT_S)
        return ask(index)

    with ThreadPoolExecutor(NUM_PARTS) as pool:
        found = list(pool.map(search, joins))
    for one, other in zip(found, expected, strict=True):
        check_equal(one, other)


@every_index
def test_prefixes_are_cut_and_searched_while_the_whole_is(build: Build) -> None:
    parts = [part(build, number) for number in range(NUM_PARTS)]
    whole = type(parts[0]).join(parts)
    lengths = [PART_TOKENS * count for count in range(1, NUM_PARTS + 1)]
    expected = [ask(type(whole).join(parts[:count])) for count in range(1, NUM_PARTS + 1)]
    together = Barrier(NUM_PARTS)

    def search(num_tokens: int) -> list[Answer]:
        together.wait(WAIT_S)
        return ask(whole.prefix(num_tokens))

    with ThreadPoolExecutor(NUM_PARTS) as pool:
        found = list(pool.map(search, lengths))
    for one, other in zip(found, expected, strict=True):
        check_equal(one, other)


@every_index
def test_the_same_keys_indexed_on_several_threads_give_the_same_index(build: Build) -> None:
    expected = part(build, 0).tensors()
    together = Barrier(3)

    def make(_: int) -> KeyIndex:
        together.wait(WAIT_S)
        return part(build, 0)

    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(make, range(3)))
    for index in made:
        for name, tensor in expected.items():
            assert torch.equal(index.tensors()[name], tensor), name
