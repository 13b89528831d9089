"""Reference and protection counts: a chunk dies once, when neither is left."""

import pytest

from offload.table import ChunkTable


def test_created_chunks_have_new_ids_and_one_reference() -> None:
    table = ChunkTable()
    first, second = table.create(3, 64), table.create(3, 128)
    assert first != second
    assert (table[second].info.layer, table[second].info.first_token) == (3, 128)
    assert table[first].ref_count == 1
    assert list(table) == [first, second]


def test_id_of_a_forgotten_chunk_is_never_reused() -> None:
    table = ChunkTable()
    gone = table.create(0, 0)
    table.forget(gone)
    assert table.create(0, 0) != gone
    assert gone not in table
    assert len(table) == 1


def test_release_reports_a_chunk_when_its_last_reference_goes() -> None:
    table = ChunkTable()
    chunk = table.create(0, 0)
    table.share([chunk, chunk])
    assert table.release([chunk]) == []
    assert table.release([chunk, chunk]) == [chunk]


def test_released_chunk_dies_when_its_last_protection_goes() -> None:
    table = ChunkTable()
    chunk = table.create(0, 0)
    table.protect([chunk])
    table.protect([chunk])
    assert table.release([chunk]) == []
    assert table.unprotect([chunk]) == []
    assert table.unprotect([chunk]) == [chunk]


def test_unprotect_of_a_chunk_in_use_keeps_it_alive() -> None:
    table = ChunkTable()
    chunk = table.create(0, 0)
    table.protect([chunk])
    assert table.unprotect([chunk]) == []
    assert table.release([chunk]) == [chunk]


def test_protected_names_the_chunks_with_a_protection_left() -> None:
    table = ChunkTable()
    first, second = table.create(0, 0), table.create(0, 64)
    table.protect([first, second])
    table.protect([first])
    table.unprotect([first, second])
    assert table.protected == {first}
    table.unprotect([first])
    assert table.protected == set()


def test_unknown_chunk_raises() -> None:
    table = ChunkTable()
    chunk = table.create(0, 0)
    table.forget(chunk)
    with pytest.raises(KeyError):
        table[chunk]
