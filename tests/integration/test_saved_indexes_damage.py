"""An entry that is no index over its chunks is found out when a session is loaded."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offload import CorruptChunk, SessionStore, resume
from offload.runtime import Runtime
from offload.saved_indexes import INDEXES, pack_indexes, restore_indexes
from tests.support.leoam_sessions import go_on, load, make_root, runtime_of, save
from tests.support.sessions import small_store


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def store(root: Path) -> Iterator[SessionStore]:
    with small_store(root) as opened:
        yield opened


@pytest.fixture(scope="module")
def bare(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """A session without indexes, under the policy of those that the other was saved with."""
    scratch = tmp_path_factory.mktemp("bare")
    with small_store(root) as opened, load(opened, scratch, name="bare") as cache:
        yield runtime_of(cache)


Damage = Callable[[dict[str, Any]], object]

DAMAGE: dict[str, Damage] = {
    "no layer": lambda each: each.pop("layer"),
    "another layer": lambda each: each.update(layer=77),
    "no such row": lambda each: each.update(row=5),
    "no segments": lambda each: each.update(lengths=[]),
    "empty segment": lambda each: each.update(lengths=[8, 0, 8, 8, 8]),
    "one segment less": lambda each: each.update(lengths=[8, 8, 8]),
    "longer segments": lambda each: each.update(lengths=[8, 8, 8, 9]),
    "more chunks than there are": lambda each: each.update(lengths=[8] * 9),
    "lengths that are none": lambda each: each.update(lengths=["8"] * 4),
    "later start": lambda each: each.update(start=30),
    "missing tensor": lambda each: each["tensors"].pop(),
    "tensor that is not there": lambda each: each.update(tensors=["index.99.lower"]),
    "name of a tensor": lambda each: each.update(tensors=["lower"]),
    "no meta": lambda each: each.update(meta=None),
    "impossible settings": lambda each: each["meta"]["settings"].update(leaf_tokens=0),
    "unknown setting": lambda each: each["meta"]["settings"].update(colour=1),
    "wrong num_tokens": lambda each: each["meta"].update(runs=[640]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_entry_that_is_no_index_over_its_chunks_is_corrupt(
    damage: str, store: SessionStore, bare: Runtime
) -> None:
    file, held = store.open("chat")
    held.release()
    saved = copy.deepcopy(file.state[INDEXES])
    DAMAGE[damage](saved[1])
    with pytest.raises(CorruptChunk, match="saved index 1: "):
        restore_indexes(bare, saved, file.tensors)


def test_index_of_fewer_heads_is_corrupt(store: SessionStore, bare: Runtime) -> None:
    file, held = store.open("chat")
    held.release()
    tensors = {
        name: tensor[:1] if name.startswith("index.") else tensor
        for name, tensor in file.tensors.items()
    }
    with pytest.raises(CorruptChunk, match="1 heads of 512 tokens, not 2 of 512"):
        restore_indexes(bare, file.state[INDEXES], tensors)


@pytest.mark.leaks
def test_session_with_a_corrupt_index_is_not_loaded_and_leaves_nothing_open(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack_wrongly(runtime: Runtime) -> Any:
        tensors, saved = pack_indexes(runtime)
        saved[-1]["lengths"][-1] += 1
        return tensors, saved

    with small_store(root) as store, small_store(tmp_path / "other") as other:
        with load(store, tmp_path) as cache:
            monkeypatch.setattr(resume, "pack_indexes", pack_wrongly)
            save(cache, other)
        with pytest.raises(CorruptChunk, match="saved index 2: "):
            load(other, tmp_path)
        with load(other, tmp_path, "exact") as cache:
            go_on(cache)
