"""Row tables: rows share lists until they grow apart, and every reference is counted once."""

from collections import Counter
from collections.abc import Iterable

import pytest

from offload.rows import RowTables
from offload.types import ChunkId


class Ledger:
    """Reference counts as the store would keep them; a count below zero is an error."""

    def __init__(self) -> None:
        self.counts: Counter[ChunkId] = Counter()
        self._next = 0

    def share(self, chunks: Iterable[ChunkId]) -> None:
        for chunk in chunks:
            assert self.counts[chunk] > 0, f"{chunk} was dead"
            self.counts[chunk] += 1

    def release(self, chunks: Iterable[ChunkId]) -> None:
        for chunk in chunks:
            assert self.counts[chunk] > 0, f"{chunk} was dead"
            self.counts[chunk] -= 1

    def columns(self, num_positions: int, num_rows: int) -> list[list[ChunkId]]:
        start, self._next = self._next, self._next + num_positions * num_rows
        made = [ChunkId(chunk) for chunk in range(start, self._next)]
        self.counts.update(made)
        return [made[i : i + num_rows] for i in range(0, len(made), num_rows)]

    @property
    def living(self) -> dict[ChunkId, int]:
        return {chunk: count for chunk, count in self.counts.items() if count}


def lists(tables: RowTables) -> list[list[int]]:
    return [list(row) for row in tables.rows]


def held(*tables: RowTables) -> dict[int, int]:
    """Count the distinct lists that hold each chunk."""
    distinct = {id(row): row for table in tables for row in table.rows}
    return dict(Counter(chunk for row in distinct.values() for chunk in row))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def tables(ledger: Ledger) -> RowTables:
    """Two rows of two positions: ``[[0, 2], [1, 3]]``."""
    tables = RowTables(ledger.share, ledger.release)
    tables.open(2)
    tables.extend(ledger.columns(2, 2))
    return tables


def test_extend_appends_columns_to_rows(ledger: Ledger, tables: RowTables) -> None:
    tables.extend(ledger.columns(1, 2))
    assert lists(tables) == [[0, 2, 4], [1, 3, 5]]
    assert (tables.num_rows, tables.num_positions) == (2, 3)


@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [1], [1, 1, 0, 1], [0, 1, 0, 1]], ids=str)
def test_select_makes_rows_copies_of_the_old_ones(
    ledger: Ledger, tables: RowTables, indices: list[int]
) -> None:
    old = lists(tables)
    tables.select(indices)
    assert lists(tables) == [old[index] for index in indices]
    assert ledger.living == held(tables)


@pytest.mark.parametrize("indices", [[0, 0], [1, 1, 0, 1], [0, 0, 0]], ids=str)
def test_rows_that_were_copies_grow_apart(
    ledger: Ledger, tables: RowTables, indices: list[int]
) -> None:
    old = lists(tables)
    tables.select(indices)
    [column] = ledger.columns(1, len(indices))
    tables.extend([column])
    assert lists(tables) == [
        [*old[index], chunk] for index, chunk in zip(indices, column, strict=True)
    ]
    assert ledger.living == held(tables)
    tables.close()
    assert ledger.living == {}


@pytest.mark.parametrize("num_positions", [0, 1, 2])
def test_truncate_of_shared_rows_releases_each_list_once(
    ledger: Ledger, tables: RowTables, num_positions: int
) -> None:
    tables.select([0, 0, 1])
    tables.truncate(num_positions)
    assert lists(tables) == [[0, 2][:num_positions]] * 2 + [[1, 3][:num_positions]]
    assert ledger.living == held(tables)


def test_fork_shares_chunks_but_not_lists(ledger: Ledger, tables: RowTables) -> None:
    tables.select([0, 0, 1])
    fork = tables.fork()
    assert lists(fork) == lists(tables)
    assert ledger.living == held(tables, fork)
    fork.truncate(1)
    fork.extend(ledger.columns(1, 3))
    assert lists(tables) == [[0, 2], [0, 2], [1, 3]]
    tables.close()
    assert ledger.living == held(fork)
    fork.close()
    assert ledger.living == {}


def test_close_releases_everything_once(ledger: Ledger, tables: RowTables) -> None:
    tables.select([1, 1])
    tables.close()
    tables.close()
    assert ledger.living == {}
    assert tables.num_positions == 0


def test_version_grows_with_every_change(ledger: Ledger, tables: RowTables) -> None:
    seen = [tables.version]
    tables.extend(ledger.columns(1, 2))
    seen.append(tables.version)
    tables.select([1, 0])
    seen.append(tables.version)
    tables.truncate(1)
    seen.append(tables.version)
    tables.close()
    seen.append(tables.version)
    assert seen == sorted(set(seen))
