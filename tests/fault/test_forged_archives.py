"""Archives with right checksums and wrong facts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.errors import ConfigError, CorruptChunk, OffloadError
from offload.peak_memory import PeakMemory
from offload.sessions.store import SessionStore
from offload.types import PAGE_BYTES
from tests.support.archives import (
    TINY,
    compress,
    forge,
    members_of,
    refuse,
    tar_of,
    unchanged,
)
from tests.support.sessions import (
    LAYERS,
    make_content,
    make_token_ids,
    read_back,
    save,
    small_store,
)


@pytest.mark.parametrize(
    ("old", "new", "kind", "message"),
    [
        (b'"version": 1', b'"version": 2', ConfigError, "another version .*: version 2"),
        (b'"version": 1', b'"version":""', ConfigError, "another version"),
        (b"kv-offload session", b"kv-offload sessioN", CorruptChunk, "is that of 'kv-offload s"),
        (b'"num_blocks": 4', b'"num_blocks": 5', CorruptChunk, "which makes"),
        (b'"num_layers": 3', b'"num_layers":-3', CorruptChunk, "impossible numbers"),
        (b'"num_layers": 3', b'"num_layers":[]', CorruptChunk, "impossible numbers"),
        (b'"num_layers": 3', b'"num_layers":3.', CorruptChunk, "is no manifest"),
        (b'"num_layers": 3', b'"num_layers":3 ', CorruptChunk, "which makes"),
        (b"\n}   ", b"\n} {}", CorruptChunk, "is no manifest"),
        (b"{\n ", b"[[[", CorruptChunk, "is no manifest"),
    ],
)
def test_manifest_that_is_not_as_it_is_written_is_refused(
    old: bytes,
    new: bytes,
    kind: type[OffloadError],
    message: str,
    store: SessionStore,
    path: Path,
    bad: Path,
) -> None:
    members = members_of(path)
    content = members[0][1]
    assert old in content
    members[0] = members[0][0], content.replace(old, new)
    bad.write_bytes(compress(tar_of(members)))
    refuse(store, bad, kind, message)


def test_deeply_nested_manifest_is_refused(store: SessionStore, path: Path, bad: Path) -> None:
    members = members_of(path)
    members[0] = members[0][0], b"[" * PAGE_BYTES
    bad.write_bytes(compress(tar_of(members)))
    refuse(store, bad, CorruptChunk, "is no manifest")


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def says(name: str, value: Any) -> Change:
    """Change one field of the description."""
    return lambda description, tensors: description.update({name: value})


def says_of_namespace(name: str, value: Any) -> Change:
    return lambda description, tensors: description["namespace"].update({name: value})


def has_tensor(name: str, value: Tensor) -> Change:
    return lambda description, tensors: tensors.update({name: value})


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"x": value}
    return value


def swap_positions(_: object, tensors: dict[str, Tensor]) -> None:
    """Name the first block of the first row as the second of the second row too."""
    table = tensors["blocks"].view(4, 40)
    table[3] = table[0]


def change_key(_: object, tensors: dict[str, Tensor]) -> None:
    tensors["blocks"].view(4, 40)[1, 20] += 1


FORGERIES: dict[str, tuple[Change, str]] = {
    "rows without end": (says("num_rows", 10**12), "num_rows is 1000000000000"),
    "rows with many digits": (says("num_rows", 10**4000), r"num_rows is 10+\.\.\.0+, not in"),
    "no rows": (says("num_rows", 0), "num_rows is 0"),
    "other rows": (says("num_rows", 3), "not a session"),
    "rows as text": (says("num_rows", "2"), "num_rows is '2'"),
    "negative tokens": (says("num_tokens", -1), "num_tokens is -1"),
    "too few tokens": (says("num_tokens", 4), "not a session"),
    "nested state": (says("state", nested(500)), "nested more than 32 deep"),
    "state of no kind": (says("state", [1]), "state is a list"),
    "namespace of no kind": (says("namespace", 7), "namespace is a int"),
    "number in the namespace": (says_of_namespace("config", 7), "a value that is no text"),
    "more in the namespace": (says_of_namespace("more", ""), "its namespace has the fields"),
    "namespace of other layers": (says_of_namespace("layers", "0,1"), "says layers '0,1'"),
    "namespace of other layout": (says_of_namespace("layout", "x"), "says layout 'x'"),
    "namespace of other dtype": (says_of_namespace("dtype", "int8"), "says dtype 'int8'"),
    "other namespace": (says_of_namespace("config", "evil"), "keys of row 0 are not those"),
    "no heads": (says("layout", [0, 4, 4, 4]), "not a session"),
    "many heads": (says("layout", [10**6, 4, 4, 4]), "at most 500 KV heads"),
    "negative layout": (says("layout", [1, -4, 4, 4]), "layout is no list"),
    "layout of three": (says("layout", [1, 4, 4]), "not a session"),
    "huge layout": (says("layout", [1, 4, 4, 10**9]), "the manifest says"),
    "empty rows": (says("layout", [1, 4, 0, 0]), "the manifest says"),
    "layers twice": (says("layers", [0, 1, 1]), "impossible layers"),
    "more layers": (says("layers", [0, 1, 2, 3]), "the manifest says"),
    "negative layer": (says("layers", [0, 1, -2]), "layers is no list"),
    "huge layer": (says("layers", [0, 1, 1 << 40]), "layers is no list"),
    "dtype that is a function": (says("dtype", "load"), "not a session"),
    "dtype that no record has": (says("dtype", "complex32"), "cannot be stored"),
    "dtype of no kind": (says("dtype", 5), "not a session"),
    "no name": (lambda description, tensors: description.pop("name"), "not a session"),
    "other tokens": (has_tensor("token_ids", torch.zeros(2, 9).long()), "keys of row 0"),
    "short tokens": (has_tensor("token_ids", torch.zeros(2, 8).long()), r"int64 \[2, 8\]"),
    "tokens with fractions": (has_tensor("token_ids", torch.zeros(2, 9)), "token ids are torch.f"),
    "no tail": (lambda description, tensors: tensors.pop("tail.1"), "tail of layer 1 is no"),
    "short tail": (has_tensor("tail.2", torch.zeros(2, 1, 0, 8)), "tail of layer 2 is no"),
    "no blocks": (lambda description, tensors: tensors.pop("blocks"), "not a session"),
    "fewer blocks": (has_tensor("blocks", torch.zeros(80, dtype=torch.uint8)), "manifest says"),
    "odd blocks": (has_tensor("blocks", torch.zeros(41, dtype=torch.uint8)), "not a session"),
    "block at two positions": (swap_positions, "one block at positions 0 and 1"),
    "key of other tokens": (change_key, "keys of row 0 are not those"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_session_file_with_right_checksums_and_wrong_facts_is_refused(
    what: str, store: SessionStore, path: Path, bad: Path
) -> None:
    change, message = FORGERIES[what]
    bad.write_bytes(forge(path, change))
    with PeakMemory() as memory:
        refuse(store, bad, OffloadError, message)
    assert memory.growth_bytes < 64 << 20


def test_forging_nothing_is_accepted(store: SessionStore, path: Path, bad: Path) -> None:
    bad.write_bytes(forge(path, lambda description, tensors: None))
    store.import_(bad, "new")
    assert len(read_back(store, "new")) == 4 * len(LAYERS)


def test_archive_that_names_its_session_outside_the_root_is_refused(
    store: SessionStore, path: Path, bad: Path
) -> None:
    bad.write_bytes(forge(path, says("name", "../../chat")))
    with unchanged(store), pytest.raises(OffloadError, match="is no name for a session"):
        store.import_(bad)


def test_record_of_another_session_is_refused(
    store: SessionStore, path: Path, bad: Path, tmp_path: Path
) -> None:
    with small_store(tmp_path / "source") as source:
        save(source, "other", make_content(2, 1, 2, make_token_ids(2, 9, 2, TINY), layout=TINY))
        source.export("other", tmp_path / "other")
    members, others = members_of(path), members_of(tmp_path / "other")
    members[5] = members[5][0], others[5][1]
    bad.write_bytes(compress(tar_of(members)))
    refuse(store, bad, CorruptChunk, "chunk_id should be")
