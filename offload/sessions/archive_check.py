"""Judge a session's file that a stranger made: its checksums are right, and prove nothing."""

import json
import struct
from collections.abc import Iterable, Iterator
from reprlib import repr as shorten
from typing import Any

import torch

from offload.errors import ConfigError, CorruptChunk
from offload.sessions.archive_format import Manifest, distinct_blocks
from offload.sessions.keys import chain_keys, is_foreign
from offload.sessions.namespace import make_namespace
from offload.sessions.session_file import SessionFile, unpack
from offload.types import PAGE_BYTES

MAX_DESCRIPTION_BYTES = 4 << 20
"""Of JSON. A segment takes 60 bytes of it; in memory JSON may take 30 times its size."""
_MAX_DEPTH = 32
_MAX_ROWS = 1 << 16
_MAX_FIELD = 1 << 31
_MAX_TOKENS = 1 << 40
_DESCRIPTION_BYTES = struct.Struct("<12xI")


def check_description(content: bytes, what: str) -> None:
    """Raise ConfigError if the JSON of a session's file is too large for an archive."""
    [num_bytes] = _DESCRIPTION_BYTES.unpack_from(content)
    if num_bytes > MAX_DESCRIPTION_BYTES:
        raise ConfigError(
            f"{what} is described in {num_bytes} bytes of JSON; an archive has at most "
            f"{MAX_DESCRIPTION_BYTES}"
        )


def unpack_foreign(content: bytes, manifest: Manifest, what: str) -> SessionFile:
    """Read the session's file of an archive, believing nothing it says.

    Parameters
    ----------
    content : bytes
    manifest : Manifest
        What the file must agree with.
    what : str
        Names it in an error.

    Raises
    ------
    CorruptChunk
        It is damaged, or says what no session says.
    ConfigError
        It is too large, or of another version.
    """
    if len(content) < PAGE_BYTES:
        raise CorruptChunk(f"{what} has {len(content)} bytes, less than its header")
    check_description(content, what)
    _refuse(what, _shape_problems(_description(content, what)))
    file = unpack(content, what)
    _refuse(what, _problems(file, manifest))
    return file


def _refuse(what: str, problems: Iterator[str]) -> None:
    problem = next(problems, None)
    if problem is not None:
        raise CorruptChunk(f"{what}: {problem}")


def _description(content: bytes, what: str) -> dict[str, Any]:
    [num_bytes] = _DESCRIPTION_BYTES.unpack_from(content)
    try:
        found = json.loads(content[PAGE_BYTES : PAGE_BYTES + num_bytes])
    except (ValueError, RecursionError) as error:
        raise CorruptChunk(f"{what}: its description is no JSON: {error!r}") from error
    if not isinstance(found, dict):
        raise CorruptChunk(f"{what}: its description is a {type(found).__name__}")
    return found


def _shape_problems(found: dict[str, Any]) -> Iterator[str]:
    """Yield what would make reading the file costly, or writing it again impossible."""
    level: list[Any] = [found]
    for _ in range(_MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
    if level:
        yield f"its description is nested more than {_MAX_DEPTH} deep"
    for name, start, stop in (("num_rows", 1, _MAX_ROWS), ("num_tokens", 0, _MAX_TOKENS)):
        if not _is_number(found.get(name), start, stop):
            yield f"{name} is {shorten(found.get(name))}, not in [{start}, {stop})"
    for name in ("layout", "layers"):
        numbers = found.get(name)
        if not isinstance(numbers, list) or not all(
            _is_number(value, 0, _MAX_FIELD) for value in numbers
        ):
            yield f"{name} is no list of numbers in [0, {_MAX_FIELD})"
    for name in ("namespace", "state"):
        if not isinstance(found.get(name), dict):
            yield f"{name} is a {type(found.get(name)).__name__}"
    if not all(isinstance(value, str) for value in found["namespace"].values()):
        yield "its namespace has a value that is no text"


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _is_number(value: Any, start: int, stop: int) -> bool:
    return type(value) is int and start <= value < stop


def _problems(file: SessionFile, manifest: Manifest) -> Iterator[str]:
    """Yield what does not fit together."""
    layout, ids = file.layout, file.token_ids
    found = (len(file.layers), len(distinct_blocks(file)), layout.chunk_bytes)
    expected = (manifest.num_layers, manifest.num_blocks, manifest.payload_bytes)
    if found != expected:
        yield f"layers, blocks and bytes of a chunk are {found}, the manifest says {expected}"
    if not layout.chunk_bytes or len(set(file.layers)) < len(file.layers):
        yield f"impossible layers {file.layers} of chunks {layout}"
    yield from _namespace_problems(file)
    yield from _tail_problems(file)
    if ids is None:
        return
    if ids.dtype != torch.int64 or ids.shape != (len(file.rows), file.num_tokens):
        yield f"token ids are {ids.dtype} {list(ids.shape)}"
    if all(is_foreign(ref.key) for refs in file.rows for ref in refs):
        return  # exported where it was not trusted either
    for row, refs in enumerate(file.rows):
        keys = chain_keys(file.namespace.digest, ids[row], layout.chunk_tokens)
        if [ref.key for ref in refs] != keys[: len(refs)]:
            yield f"the keys of row {row} are not those of its tokens"


def _tail_problems(file: SessionFile) -> Iterator[str]:
    """Yield which layers do not have the tokens behind the last block."""
    layout, num_rows = file.layout, len(file.rows)
    num_left = file.num_tokens - len(file.rows[0]) * layout.chunk_tokens
    shape = (num_rows, layout.num_kv_heads, num_left, layout.row_dim)
    for layer in file.layers:
        tail = file.tensors.get(f"tail.{layer}")
        if tail is None or tail.shape != shape or tail.dtype != layout.dtype:
            yield f"the tail of layer {layer} is no {layout.dtype} {list(shape)}"


def _namespace_problems(file: SessionFile) -> Iterator[str]:
    """Yield what the namespace says of the chunks that is not so: others would be misled."""
    fields = file.namespace.fields
    model = {name: fields.get(name, "") for name in ("config", "rotary", "weights")}
    model["dtype"] = fields.get("model_dtype", "")
    true = make_namespace(model, file.layout, list(file.layers), salt="").fields
    if set(fields) != set(true):
        yield f"its namespace has the fields {shorten(sorted(fields))}"
    for name in ("format", "dtype", "layout", "layers"):
        if fields.get(name) != true[name]:
            said = shorten(fields.get(name))
            yield f"its namespace says {name} {said}, the session {true[name]!r}"
