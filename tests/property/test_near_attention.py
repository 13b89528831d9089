"""Attention beside the disk is attention, however heads, rows and chunks are divided."""

import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload.kernels.reference import merge
from offload.tiers.near.disk import NearDisk
from offload.tiers.near.sparf_settings import SparF
from offload.types import ChunkLayout, Partial
from tests.support.disk import WAIT_S
from tests.support.near import draw_query, exact, fill, held_launcher, largest_error, make_near

MOST = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
GROUP_TOKENS = 16


@pytest.fixture(scope="module", autouse=True)
def _launcher() -> Iterator[None]:
    with held_launcher():
        yield


@dataclass(frozen=True, slots=True)
class Case:
    """A tier of ``num_workers``, and rows of a batch that ask about some of its chunks each.

    Attributes
    ----------
    rows : list of list of int
        Numbers of chunks, in any order.
    """

    layout: ChunkLayout
    num_workers: int
    group_size: int
    rows: list[list[int]]

    def open(self, directory: Path, *, has_channels: bool = False) -> NearDisk:
        return make_near(
            directory,
            16,
            self.layout,
            workers_per_path=self.num_workers,
            has_channels=has_channels,
        )

    def query(self) -> Tensor:
        return draw_query(len(self.rows), self.layout, self.group_size)

    def exact(self, chunks: Tensor, rows: list[list[int]] | None = None) -> Partial:
        """Attend exactly; ``chunks`` are all that the tier holds."""
        query = self.query()
        parts = [
            exact(query[[number]], chunks[row].unsqueeze(0), self.layout)
            for number, row in enumerate(rows or self.rows)
        ]
        return Partial(*(torch.cat(each) for each in zip(*parts, strict=True)))


NUM_CHUNKS = 4
SOME_CHUNKS = st.lists(st.integers(0, NUM_CHUNKS - 1), min_size=1, max_size=4, unique=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads, dtype = draw(st.integers(1, 4)), draw(DTYPES)
    key_dim, value_dim = draw(st.sampled_from([(7, 9), (16, 16), (24, 8), (1, 1), (64, 64)]))
    tokens = draw(st.sampled_from([1, 5, 16, 64]))
    layout = ChunkLayout(heads, tokens, key_dim, value_dim, dtype)
    rows = draw(st.lists(SOME_CHUNKS, min_size=1, max_size=3))
    return Case(layout, draw(st.integers(1, heads)), draw(st.integers(1, 4)), rows)


@st.composite
def sparf_cases(draw: st.DrawFn) -> Case:
    """Draw cases whose groups of 16 tokens are what is verified by itself."""
    heads, dtype = draw(st.integers(1, 3)), draw(DTYPES)
    dim = 128 // dtype.itemsize
    layout = ChunkLayout(heads, 64, dim, dim, dtype)
    rows = draw(st.lists(SOME_CHUNKS, min_size=1, max_size=2))
    return Case(layout, draw(st.integers(1, heads)), draw(st.integers(1, 4)), rows)


def ask(
    disk: NearDisk, query: Tensor, rows: list[list[int]], slots: np.ndarray, how: SparF | None
) -> Partial:
    """Ask under one name for each row, as a cache does."""
    asked = [(number, slots[row]) for number, row in enumerate(rows)]
    return disk.attend(query, asked, disk.layout.key_dim**-0.5, how).wait(WAIT_S)


@given(case=cases())
@settings(max_examples=15)
def test_dense_attention_of_any_rows_is_exact_attention(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder, closing(case.open(Path(folder))) as disk:
        held, query = fill(disk, 1, NUM_CHUNKS), case.query()
        found = ask(disk, query, case.rows, held.slots[0], None)
        most = MOST[case.layout.dtype]
        assert largest_error(found, case.exact(held.chunks[0])) <= most
        # The worker knows the rows of these names, and is told only what has changed.
        changed = [[*row[: len(row) // 2], 0] for row in case.rows]
        found = ask(disk, query, changed, held.slots[0], None)
        assert largest_error(found, case.exact(held.chunks[0], changed)) <= most


@given(case=cases(), split=st.integers(0, NUM_CHUNKS - 1))
@settings(max_examples=10)
def test_part_on_disk_merged_with_a_resident_part_is_the_whole(case: Case, split: int) -> None:
    below, above = list(range(split)), list(range(split, NUM_CHUNKS))
    num_rows = len(case.rows)
    with tempfile.TemporaryDirectory() as folder, closing(case.open(Path(folder))) as disk:
        held, query = fill(disk, 1, NUM_CHUNKS), case.query()
        on_disk = ask(disk, query, [below] * num_rows, held.slots[0], None)
        resident = case.exact(held.chunks[0], [above] * num_rows)
        whole = case.exact(held.chunks[0], [below + above] * num_rows)
        assert largest_error(merge([on_disk, resident]), whole) <= MOST[case.layout.dtype]


@given(case=sparf_cases())
@settings(max_examples=5)
def test_sparf_of_all_channels_and_all_tokens_is_exact_attention(case: Case) -> None:
    layout = case.layout
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(case.open(Path(folder), has_channels=True)) as disk,
    ):
        held = fill(disk, 1, NUM_CHUNKS)
        found = ask(disk, case.query(), case.rows, held.slots[0], SparF(layout.key_dim, 1.0))
        assert largest_error(found, case.exact(held.chunks[0])) <= MOST[layout.dtype]


@given(
    case=sparf_cases(),
    channels=st.integers(1, 64),
    num_groups=st.integers(1, 4),
)
@settings(max_examples=10)
def test_sparf_reads_what_the_definition_says(case: Case, channels: int, num_groups: int) -> None:
    how = SparF(channels, num_groups * GROUP_TOKENS, GROUP_TOKENS)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(case.open(Path(folder), has_channels=True)) as disk,
    ):
        held, query = fill(disk, 1, NUM_CHUNKS), case.query()
        found = ask(disk, query, case.rows, held.slots[0], how)
        for number, row in enumerate(case.rows):
            wanted = by_definition(query[number], held.chunks[0][row], case.layout, how)
            own = Partial(found.out[number], found.lse[number])
            assert largest_error(own, wanted) <= MOST[case.layout.dtype]


@given(case=sparf_cases(), num_groups=st.integers(1, 15))
@settings(max_examples=8)
def test_sparf_answer_weighs_as_much_as_all_its_tokens_so_that_parts_merge(
    case: Case, num_groups: int
) -> None:
    """With all channels, only the rounding of keys to 8 bits stands between it and the truth."""
    rows = [list(range(NUM_CHUNKS))] * len(case.rows)
    how = SparF(case.layout.key_dim, num_groups * GROUP_TOKENS, GROUP_TOKENS)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(case.open(Path(folder), has_channels=True)) as disk,
    ):
        held = fill(disk, 1, NUM_CHUNKS)
        found = ask(disk, case.query(), rows, held.slots[0], how)
        wanted = case.exact(held.chunks[0], rows)
        assert float((found.lse - wanted.lse).abs().max()) <= 0.02


def by_definition(query: Tensor, chunks: Tensor, layout: ChunkLayout, how: SparF) -> Partial:
    """SparF attention for one row, head by head, in float64.

    Parameters
    ----------
    query : Tensor, shape (num_heads, key_dim)
    chunks : Tensor, shape (num_chunks, num_kv_heads, chunk_tokens, row_dim)
    """
    asked = query.double().unflatten(0, (layout.num_kv_heads, -1)) * layout.key_dim**-0.5
    parts = [
        one_head(asked[head], chunks[:, head].float(), layout.key_dim, how)
        for head in range(layout.num_kv_heads)
    ]
    return Partial(*(torch.cat(each).float() for each in zip(*parts, strict=True)))


def one_head(asked: Tensor, chunks: Tensor, key_dim: int, how: SparF) -> Partial:
    """As above for ``asked`` [group_size, key_dim], scaled, of one KV head."""
    channels = asked.abs().sum(0).argsort(descending=True, stable=True)[: how.channels]
    coverage = asked[:, channels].abs().sum(1) / asked.abs().sum(1)
    keys, values = chunks[..., :key_dim], chunks[..., key_dim:].flatten(0, 1)
    # Each chunk is rounded by itself until a block is written; in float32, where it matters.
    peak = keys.abs().amax(1, keepdim=True)
    codes = (keys * (torch.full_like(peak, 127) / peak)).round()
    rounded = (codes.double() * (peak / 127)).flatten(0, 1)
    keys, values = keys.double(), values.double()
    logits = asked[:, channels] @ rounded[:, channels].T / coverage.sqrt().unsqueeze(1)
    mass = logits.softmax(-1).unflatten(1, (-1, how.group_tokens)).sum(-1)
    num_groups = how.num_groups(len(values), how.group_tokens)
    groups = mass.sum(0).argsort(descending=True)[:num_groups]
    tokens = (groups[:, None] * how.group_tokens + torch.arange(how.group_tokens)).flatten()
    scores = asked @ keys.flatten(0, 1)[tokens].T
    alpha = mass[:, groups].sum(-1, keepdim=True)
    out = alpha * (scores.softmax(-1) @ values[tokens]) + (1 - alpha) * values.mean(0)
    return Partial(out, scores.logsumexp(-1) - alpha.squeeze(1).log())
