"""What a step's attention to chunks comes to, and when it is reported."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from offload.sparse.importance import ImportanceWatch
from offload.sparse.outlook import Run
from offload.types import ChunkId, ChunkLayout

LAYOUT = ChunkLayout(2, 4, 8, 8, torch.float32)
NUM_TOKENS, OWNER = 32, 1
CHUNKS = [ChunkId(number) for number in range(10, 10 + NUM_TOKENS // LAYOUT.chunk_tokens)]
RUN = Run(0, (OWNER, 0), 0, CHUNKS, (0, 1))
EVERY = 4


class Reports(list[Mapping[ChunkId, float]]):
    """Every step that was reported, and the watch that did it."""

    def __init__(self, most_rows: int = NUM_TOKENS) -> None:
        super().__init__()
        self.watch = ImportanceWatch(LAYOUT, [self.append], most_rows)

    def begin_measured(self, owner: int = OWNER, layers: int = 1) -> None:
        """Go on to the next step that is measured, and begin its first layer."""
        for _ in range(EVERY - 1):
            for layer in range(layers):
                self.watch.begin(owner, layer, 1)
        self.watch.begin(owner, 0, 1)


@pytest.fixture
def reports() -> Reports:
    return Reports()


def make_heads() -> tuple[Tensor, Tensor]:
    """Return rows [num_heads, num_tokens, row_dim], and queries [num_heads, group, key_dim]."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, NUM_TOKENS, LAYOUT.row_dim, generator=generator)
    return rows, torch.randn(2, 3, LAYOUT.key_dim, generator=generator)


def addresses_of(rows: Tensor, ids: Tensor) -> Tensor:
    row_bytes = LAYOUT.row_dim * LAYOUT.dtype.itemsize
    heads = torch.arange(2).unsqueeze(1) * NUM_TOKENS
    return torch.where(ids >= 0, rows.data_ptr() + (heads + ids) * row_bytes, 0)


def add(watch: ImportanceWatch, ids: Tensor) -> Tensor:
    """Report what was read; return the share of attention of every chunk, [num_chunks]."""
    rows, query = make_heads()
    logits = query @ rows[..., : LAYOUT.key_dim].mT
    watch.add(query, RUN, ids, addresses_of(rows, ids), logits.logsumexp(-1))
    shares = logits.softmax(-1).mean(1)
    kept = torch.zeros_like(shares, dtype=torch.bool)
    for head, tokens in enumerate(ids):
        kept[head, tokens[tokens >= 0]] = True
    by_chunk: Tensor = (shares * kept).mean(0).unflatten(0, (-1, LAYOUT.chunk_tokens))
    return by_chunk.sum(-1)


def test_masses_are_the_shares_of_attention_of_what_was_read(reports: Reports) -> None:
    reports.begin_measured()
    ids = torch.tensor([[0, 5, 6, 31, -1], [4, 5, 20, 21, 22]])
    expected = add(reports.watch, ids)
    reports.watch.begin(OWNER, 0, 1)
    [masses] = reports
    assert set(masses) == {CHUNKS[position] for position in (0, 1, 5, 7)}
    for chunk, mass in masses.items():
        assert mass == pytest.approx(float(expected[CHUNKS.index(chunk)]), rel=1e-5)


def test_masses_of_everything_add_up_to_one(reports: Reports) -> None:
    reports.begin_measured()
    add(reports.watch, torch.arange(NUM_TOKENS).expand(2, -1))
    reports.watch.begin(OWNER, 0, 1)
    assert sum(reports[0].values()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("most_rows", [1, 7, 16, 31])
def test_samples_of_many_rows_make_up_all_of_them_in_turn(most_rows: int) -> None:
    reports, ids = Reports(most_rows), torch.arange(NUM_TOKENS).expand(2, -1)
    num_samples = -(-NUM_TOKENS // most_rows)
    for _ in range(EVERY * num_samples + 1):
        reports.watch.begin(OWNER, 0, 1)
        expected = add(reports.watch, ids)
    for position, chunk in enumerate(CHUNKS):
        found = sum(masses.get(chunk, 0.0) for masses in reports) / num_samples
        assert found == pytest.approx(float(expected[position]), rel=1e-5)


def test_step_that_read_nothing_has_no_masses(reports: Reports) -> None:
    reports.begin_measured()
    add(reports.watch, torch.empty(2, 0, dtype=torch.int64))
    reports.watch.begin(OWNER, 0, 1)
    assert reports == [{}]


def test_masses_are_means_over_rows_and_positions(reports: Reports) -> None:
    reports.begin_measured()
    reports.watch.begin(OWNER, 1, 2)
    for _ in range(2):
        expected = add(reports.watch, torch.tensor([[0], [1]]))
    reports.watch.begin(OWNER, 0, 1)
    assert reports[0] == {CHUNKS[0]: pytest.approx(float(expected[0]), rel=1e-5)}


def test_chunks_read_whole_count_as_much_as_the_one_that_got_most(reports: Reports) -> None:
    reports.begin_measured()
    rows = [[ChunkId(1), *CHUNKS, ChunkId(2), ChunkId(3)]]
    reports.watch.add_whole(rows, len(CHUNKS) + 2, range(1, len(CHUNKS) + 1))
    add(reports.watch, torch.arange(NUM_TOKENS).expand(2, -1))
    reports.watch.begin(OWNER, 0, 1)
    most = max(reports[0].values())
    assert {chunk for chunk, mass in reports[0].items() if mass == most} >= {1, 2}
    assert ChunkId(3) not in reports[0]


def test_one_step_in_four_is_measured_and_reported_once(reports: Reports) -> None:
    for _ in range(3 * EVERY + 1):
        for layer in range(2):
            reports.watch.begin(OWNER, layer, 1)
            add(reports.watch, torch.tensor([[0], [1]]))
    assert len(reports) == 3


def test_steps_of_forks_that_take_turns_are_reported_each_by_itself(reports: Reports) -> None:
    for step in range(EVERY + 1):
        for owner in (1, 2):
            reports.watch.begin(owner, 0, 1)
            add(reports.watch, torch.tensor([[4 * owner], [4 * owner]]))
        assert len(reports) == (2 if step == EVERY else 0)
    assert [set(masses) for masses in reports] == [{CHUNKS[1]}, {CHUNKS[2]}]


def test_step_of_a_fork_that_is_forgotten_is_never_reported(reports: Reports) -> None:
    reports.begin_measured()
    add(reports.watch, torch.tensor([[0], [1]]))
    reports.watch.forget(OWNER)
    reports.begin_measured()
    assert reports == []
