"""A store of blocks while nothing fails."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from offload.errors import ClosedError, ConfigError
from offload.plugins.namespace import Namespace, info_of, key_in, key_of
from tests.support.blocks import RECORD_BYTES, content, load_blocks, make_store, store_blocks

NAMES = [b"a", b"b", b"c", b"d"]


def test_block_stored_then_loaded_is_equal(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store_blocks(store, NAMES) == [True] * 4
    assert load_blocks(store, [*NAMES, b"x"]) == [True] * 4 + [False]
    store.close()


def test_store_opened_again_holds_what_it_held(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store_blocks(store, NAMES)
    store.close()
    again = make_store(tmp_path)
    assert again.num_blocks == 4
    assert load_blocks(again, NAMES) == [True] * 4
    again.check_integrity()
    again.close()


def test_store_of_another_model_holds_nothing(tmp_path: Path) -> None:
    store, other = make_store(tmp_path), make_store(tmp_path, model="other")
    store_blocks(store, NAMES)
    assert load_blocks(other, NAMES) == [False] * 4
    store.close()
    other.close()


def test_store_that_is_full_evicts_the_least_recently_used(tmp_path: Path) -> None:
    store = make_store(tmp_path, 4)
    store_blocks(store, NAMES)
    store.touch([b"a"])
    load_blocks(store, [b"b"])
    store_blocks(store, [b"e", b"f"])
    assert [store.holds(name) for name in (*NAMES, b"e", b"f")] == [True] * 2 + [False] * 2 + [
        True
    ] * 2
    assert store.stats.num_evicted == 2
    store.close()


def test_files_of_a_store_that_is_full_are_within_the_quota(tmp_path: Path) -> None:
    store = make_store(tmp_path, 4)
    for number in range(40):
        store_blocks(store, [b"%d" % number])
    sizes = [path.stat().st_size for path in store.folder.glob("*.kvseg")]
    assert sum(sizes) <= 4 * RECORD_BYTES
    store.close()


def test_batch_of_more_blocks_than_slots_stores_what_there_is_room_for(tmp_path: Path) -> None:
    store = make_store(tmp_path, 3)
    assert store_blocks(store, NAMES) == [True] * 3 + [False]
    assert store.stats.num_refused == 1
    store.close()


def test_block_stored_twice_is_written_once(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store_blocks(store, [b"a", b"a"]) == [True, True]
    assert store_blocks(store, [b"a"]) == [True]
    assert store.stats.num_stored == store.num_blocks == 1
    store.close()


def test_store_opened_with_a_smaller_quota_gives_space_back(tmp_path: Path) -> None:
    store = make_store(tmp_path, 8)
    store_blocks(store, [b"%d" % number for number in range(8)])
    store.close()
    smaller = make_store(tmp_path, 2)
    [path] = smaller.folder.glob("*.kvseg")
    assert (smaller.num_blocks, path.stat().st_size) == (2, 2 * RECORD_BYTES)
    smaller.close()


def test_store_opened_twice_at_once_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with pytest.raises(ConfigError, match="in use by another engine"):
        make_store(tmp_path)
    store.close()
    make_store(tmp_path).close()


def test_quota_of_less_than_one_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="less than one block"):
        make_store(tmp_path, 0)


def test_row_of_another_size_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with pytest.raises(ConfigError, match="do not fit"):
        store.submit_store([b"a"], [content(b"a")[1:]])
    store.close()


def test_closed_store_refuses_blocks(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.close()
    with pytest.raises(ClosedError):
        store.submit_load([b"a"], [np.zeros_like(content(b"a"))])


@pytest.mark.parametrize("name", [b"", b"a", bytes(64)])
def test_key_survives_the_fields_of_a_header(name: bytes) -> None:
    assert key_in(info_of(key_of(name))) == key_of(name)


@pytest.mark.parametrize("field", ["engine", "model", "dtype", "details"])
def test_namespace_that_differs_in_one_field_has_another_fingerprint(field: str) -> None:
    fields = {"engine": "e", "model": "m", "dtype": "d", "details": ""}
    one, other = (
        Namespace(each["engine"], each["model"], each["dtype"], 1, 1, details=each["details"])
        for each in (fields, fields | {field: "other"})
    )
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("module", ["vllm_tier", "sglang_hicache"])
def test_plugin_without_its_engine_says_what_it_needs(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vllm", "sglang"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="cannot be without it"):
        importlib.import_module(f"offload.plugins.{module}")
