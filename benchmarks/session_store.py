"""How long a large session store takes to check, to open, to search and to rebuild.

Two roots. One is real: 16 KiB chunks, saved through the store, and all of them read and verified by
``fsck``. The other only has its catalog, made with the store's own functions, and empty files of
the right size: a million chunks take up no space there, and nothing that is measured reads them.

    python -m benchmarks.session_store [--full] [--directory DIR] [--json FILE]
"""

import argparse
import json
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from offload.sessions import blocks, opening
from offload.sessions.keys import KEY_BYTES, chain_keys
from offload.sessions.namespace import Namespace, layout_text, make_namespace
from offload.sessions.paths import make_shard, new_id
from offload.sessions.rebuild import rebuild
from offload.sessions.root import Root
from offload.sessions.saving import Content, add_session
from offload.sessions.session_file import BlockRef, SessionFile, write_session_file
from offload.sessions.store import SessionStore
from offload.tiers.record import RecordFormat
from offload.tiers.transfer import CompletedTransfer, Transfer
from offload.types import ChunkLayout

_LAYOUT = ChunkLayout(4, 16, 64, 64, torch.bfloat16)
_MODEL = {"config": "c", "rotary": "r", "weights": "w", "dtype": "bfloat16"}
_PER_SESSION = 1000
"""Positions of a synthetic session; 16,000 tokens."""
_PROBES = 5
"""What is quick is measured so often, and the median told."""


@dataclass(frozen=True)
class FsckRow:
    """A real root."""

    num_chunks: int
    num_bytes: int
    save_s: float
    fsck_s: float
    fsck_gb_s: float
    rebuild_s: float


@dataclass(frozen=True)
class CatalogRow:
    """A root that has little but a catalog."""

    num_chunks: int
    num_layers: int
    num_blocks: int
    num_sessions: int
    catalog_mib: float
    open_s: float
    list_s: float
    usage_s: float
    find_prefix_s: float
    find_nothing_s: float
    open_session_s: float
    save_s: float
    delete_s: float
    rebuild_s: float


def measure_fsck(directory: Path, num_chunks: int) -> FsckRow:
    """Save sessions of 32 layers, then read and verify all of them."""
    layers, root = tuple(range(32)), directory / "real"
    num_positions = num_chunks // len(layers)
    with closing(SessionStore(root, quota=1 << 40, min_free=0)) as store:
        started = time.perf_counter()
        for first in range(0, num_positions, _PER_SESSION):
            content = _content(layers, min(_PER_SESSION, num_positions - first), seed=first)
            store.save(f"session-{first}", content).held.release()
        save_s = time.perf_counter() - started
        with tqdm(total=num_chunks, desc="fsck", unit="chunk", disable=None) as bar:
            report = store.fsck(progress=lambda done, total: bar.update(done - bar.n))
        assert report.is_clean
    rebuilt = rebuild(root)
    shutil.rmtree(root)
    return FsckRow(
        num_chunks=report.num_chunks,
        num_bytes=report.num_bytes,
        save_s=save_s,
        fsck_s=report.seconds,
        fsck_gb_s=report.num_bytes / report.seconds / 1e9,
        rebuild_s=rebuilt.seconds,
    )


def measure_catalog(directory: Path, num_chunks: int, num_layers: int) -> CatalogRow:
    """Fill a catalog, then use the root."""
    layers, path = tuple(range(num_layers)), directory / f"catalog-{num_layers}"
    num_blocks = num_chunks // num_layers
    namespace = _namespace(layers)
    with closing(Root(path)) as root:
        root.ledger.configure(1 << 42, 0)
        _fill(root, namespace, layers, num_blocks)
    known, unknown = (_token_ids(_PER_SESSION, seed) for seed in (0, -1))
    open_s = _median(lambda: SessionStore(path).close())
    with closing(SessionStore(path)) as store:
        row = CatalogRow(
            num_chunks=num_blocks * num_layers,
            num_layers=num_layers,
            num_blocks=num_blocks,
            num_sessions=store.usage().num_sessions,
            catalog_mib=store._root.catalog.num_bytes / (1 << 20),
            open_s=open_s,
            list_s=_median(store.list),
            usage_s=_median(store.usage),
            find_prefix_s=_median(lambda: _find(store, namespace, known)),
            find_nothing_s=_median(lambda: _find(store, namespace, unknown)),
            open_session_s=_median(lambda: store.open("session-0")[1].release()),
            save_s=_timed(lambda: store.save("new", _content(layers, 4, seed=-2)).held.release()),
            delete_s=_timed(lambda: store.delete("session-0")),
            rebuild_s=0.0,
        )
    found = rebuild(path)
    assert found.num_sessions == row.num_sessions
    shutil.rmtree(path)
    return CatalogRow(**{**asdict(row), "rebuild_s": found.seconds})


def _find(store: SessionStore, namespace: Namespace, token_ids: Tensor) -> int:
    """Look for a prefix in the catalog, as ``SessionStore.find_prefix`` does before it reads."""
    found = opening.find_prefix(
        store._root,
        namespace.model_digest,
        _LAYOUT.chunk_tokens,
        token_ids,
        lambda layout: namespace.digest,
    )
    if found is None:
        return 0
    found[1].release()
    return len(found[1].rows[0])


def _fill(root: Root, namespace: Namespace, layers: tuple[int, ...], num_blocks: int) -> None:
    """Make segments, session files and the rows of a catalog; the segments have no content."""
    record_bytes = RecordFormat(_LAYOUT).record_bytes
    with root.catalog.transaction() as db:
        db.execute(
            "INSERT INTO namespaces VALUES (?, ?, ?)",
            (namespace.digest, namespace.model_digest, layout_text(_LAYOUT)),
        )
    firsts = range(0, num_blocks, _PER_SESSION)
    for first in tqdm(firsts, desc=f"{len(layers)} layers", unit="session", disable=None):
        count = min(_PER_SESSION, num_blocks - first)
        file, shape = _session(namespace, layers, count, first), (len(layers), count)
        [segment] = file.segments
        path = root.paths.segment(segment)
        make_shard(path)
        with path.open("wb") as opened:
            opened.truncate(shape[0] * shape[1] * record_bytes)
        size = write_session_file(root.paths.session(file.identity), file, sync=False)
        with root.catalog.transaction() as db:
            number = blocks.add_segment(db, segment, namespace.digest, shape, record_bytes)
            ids = [blocks.add_block(db, number, ref.position, ref.key) for ref in file.rows[0]]
            add_session(db, file, ids, size)


def _session(namespace: Namespace, layers: tuple[int, ...], count: int, first: int) -> SessionFile:
    token_ids, segment = _token_ids(count, first), new_id()
    keys = chain_keys(namespace.digest, token_ids[0], _LAYOUT.chunk_tokens)
    assert all(len(key) == KEY_BYTES for key in keys)
    return SessionFile(
        identity=new_id(),
        name=f"session-{first}",
        namespace=namespace,
        layout=_LAYOUT,
        layers=layers,
        num_tokens=token_ids.shape[1],
        rows=(tuple(BlockRef(segment, position, key) for position, key in enumerate(keys)),),
        segments={segment: (len(layers), count)},
        tensors={"token_ids": token_ids, **_tails(layers)},
        state={},
        created_at=time.time(),
    )


def _content(layers: tuple[int, ...], count: int, seed: int) -> Content:
    """Return a session to save whose chunks are random, but all alike."""
    payload = torch.frombuffer(
        bytearray(secrets.token_bytes(_LAYOUT.slot_bytes)), dtype=torch.uint8
    )

    def read(chunks: Sequence[int], out: Sequence[Tensor]) -> Transfer:
        for buffer in out:
            buffer.copy_(payload)
        return CompletedTransfer(len(chunks) * _LAYOUT.slot_bytes)

    names = iter(range(count * len(layers)))
    rows = [[tuple(next(names) for _ in layers) for _ in range(count)]]
    token_ids = _token_ids(count, seed)
    num_tokens = token_ids.shape[1]
    namespace, tails = _namespace(layers), _tails(layers)
    return Content(namespace, _LAYOUT, layers, num_tokens, rows, read, token_ids, tails, {}, {})


def _tails(layers: tuple[int, ...]) -> dict[str, Tensor]:
    """Return growing chunks of no token."""
    shape = (1, _LAYOUT.num_kv_heads, 0, _LAYOUT.row_dim)
    return {f"tail.{layer}": torch.empty(shape, dtype=_LAYOUT.dtype) for layer in layers}


def _namespace(layers: tuple[int, ...]) -> Namespace:
    return make_namespace(_MODEL, _LAYOUT, list(layers), "")


def _token_ids(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 10)
    return torch.randint(50_000, (1, count * _LAYOUT.chunk_tokens), generator=generator)


def _timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _median(act: Callable[[], object]) -> float:
    return sorted(_timed(act) for _ in range(_PROBES))[_PROBES // 2]


def show(row: FsckRow | CatalogRow) -> Iterator[str]:
    """Return the lines of a table."""
    for name, value in asdict(row).items():
        text = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
        yield f"{name:>16} {text:>16}"
    yield ""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--full", action="store_true", help="100,000 chunks to check, 1,000,000 to catalog"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Measure, print, and keep the results."""
    options = parse(arguments)
    torch.set_num_threads(1)
    num_checked, num_cataloged = (100_000, 1_000_000) if options.full else (6_400, 64_000)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        fsck = measure_fsck(Path(folder), num_checked)
        print(*show(fsck), sep="\n")
        results["fsck"] = asdict(fsck)
        for num_layers in options.layers:
            row = measure_catalog(Path(folder), num_cataloged, num_layers)
            print(*show(row), sep="\n")
            results[f"catalog of {num_layers} layers"] = asdict(row)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
