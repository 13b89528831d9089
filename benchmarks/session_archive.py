"""Export and import of sessions: how fast, and how much smaller than the keys and values they hold.

Sessions of normally distributed numbers, and of a document that the shipped recall model has read,
in both dtypes. "plain" is zstd at the same level on the same payloads without byte planes. Rates
count payload bytes; the best of some rounds, because other programs can only make one slower.
An import reads the archive twice: it verifies all of it before it writes anything.

    python -m benchmarks.session_archive [--tokens 8192] [--mib 256] [--rounds 3]
        [--directory DIR] [--json FILE]
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import zstandard
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from offload import OffloadedCache, SessionStore
from offload.prefill import prefill
from offload.recall_data import build_document
from offload.recall_model import load_recall_model
from offload.sessions.archive_source import RecordSource
from offload.sessions.namespace import make_namespace
from offload.sessions.opening import open_session
from offload.sessions.root import Root
from offload.sessions.saving import Content
from offload.tiers.codec import LEVEL
from offload.tiers.transfer import CompletedTransfer, Transfer
from offload.types import ChunkLayout

_GB = 1e9
_NAME = "session"
_PIECE_TOKENS = 512
_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Row:
    """One session. Shares are of the payload bytes; CPU time counts all threads."""

    content: str
    dtype: str
    chunk_kib: float
    payload_mib: float
    shuffled_share: float
    plain_share: float
    archive_share: float
    export_gb_s: float
    export_cpu_s_per_gb: float
    import_gb_s: float
    import_cpu_s_per_gb: float


def save_normal(store: SessionStore, dtype: torch.dtype, num_bytes: int) -> None:
    """Save normally distributed keys and values in chunks of an 8B model with GQA."""
    layout = ChunkLayout(8, 64, 128, 128, dtype)
    layers = (0, 1, 2, 3)
    num_chunks = num_bytes // (len(layers) * layout.slot_bytes)
    generator = torch.Generator().manual_seed(0)

    def read(chunks: object, out: list[Tensor]) -> Transfer:
        for buffer in out:
            values = torch.randn(layout.num_elements, generator=generator).to(dtype)
            buffer[: layout.chunk_bytes] = values.view(torch.uint8)
        return CompletedTransfer(len(out) * layout.chunk_bytes)

    model = {"config": "", "rotary": "", "weights": "", "dtype": str(dtype)}
    tail = torch.empty(1, layout.num_kv_heads, 0, layout.row_dim, dtype=dtype)
    columns = [tuple(position * len(layers) + i for i in layers) for position in range(num_chunks)]
    content = Content(
        namespace=make_namespace(model, layout, list(layers), ""),
        layout=layout,
        layers=layers,
        num_tokens=num_chunks * layout.chunk_tokens,
        rows=[columns],
        read=read,  # type: ignore[arg-type]
        token_ids=None,
        tensors={f"tail.{layer}": tail for layer in layers},
        state={},
        known={},
    )
    store.save(_NAME, content).held.release()


def save_recall(store: SessionStore, dtype: torch.dtype, num_tokens: int) -> None:
    """Save what the recall model keeps of a document."""
    model, _ = load_recall_model(dtype)
    document = build_document(num_tokens, 4, 0)
    ids = torch.tensor([document.token_ids])
    with OffloadedCache(["gpu", "cpu"], capacity={"gpu": "4GiB", "cpu": "4GiB"}) as cache:
        with tqdm(total=ids.shape[1], unit="token", desc="prefill", leave=False) as bar:
            prefill(model, cache, ids, _PIECE_TOKENS, bar.update)
        cache.save(_NAME, store=store, model=model, token_ids=ids)


def timed(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the least wall time, and the CPU time of that round."""
    best = (float("inf"), 0.0)
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
    return best


def plain_bytes(root: Path) -> tuple[int, int]:
    """Return the bytes of all payloads, and of the same compressed without byte planes."""
    before = after = 0
    opened = Root(root)
    try:
        file, held = open_session(opened, _NAME)
        compressor = zstandard.ZstdCompressor(level=LEVEL).compressobj()
        for _, payload in RecordSource(opened, file, held).records():
            before += len(payload)
            after += len(compressor.compress(payload.numpy().data))
        held.release()
        return before, after + len(compressor.flush())
    finally:
        opened.close()


def measure(
    what: str, dtype: torch.dtype, save: Callable[[SessionStore], None], rounds: int, folder: Path
) -> Row:
    folder.mkdir()
    archive = folder / "session.kv.tar.zst"
    with (
        SessionStore(folder / "root", quota="8GiB", min_free=0) as store,
        SessionStore(folder / "other", quota="8GiB", min_free=0) as other,
    ):
        save(store)
        layout = store.describe(_NAME).layout
        report = store.export(_NAME, archive)

        def export_it() -> None:
            store.export(_NAME, archive, overwrite=True)

        def import_it() -> None:
            other.import_(archive)
            other.delete(_NAME)

        exported, imported = timed(export_it, rounds), timed(import_it, rounds)
    before, after = plain_bytes(folder / "root")
    return Row(
        content=what,
        dtype=str(dtype).removeprefix("torch."),
        chunk_kib=layout.chunk_bytes / 1024,
        payload_mib=before / 2**20,
        shuffled_share=report.num_shuffled / report.num_chunks,
        plain_share=after / before,
        archive_share=report.archive_bytes / before,
        export_gb_s=before / exported[0] / _GB,
        export_cpu_s_per_gb=exported[1] * _GB / before,
        import_gb_s=before / imported[0] / _GB,
        import_cpu_s_per_gb=imported[1] * _GB / before,
    )


def show(rows: list[Row]) -> None:
    table = Table(show_edge=False, header_style="bold")
    for title in ("session", "dtype", "chunk", "payload", "in planes", "plain", "archive"):
        table.add_column(title, justify="left" if title in ("session", "dtype") else "right")
    for title in ("export", "CPU", "import", "CPU"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.content,
            row.dtype,
            f"{row.chunk_kib:.0f} KiB",
            f"{row.payload_mib:.0f} MiB",
            f"{row.shuffled_share:.0%}",
            f"{row.plain_share:.3f}",
            f"{row.archive_share:.3f}",
            f"{row.export_gb_s:.2f} GB/s",
            f"{row.export_cpu_s_per_gb:.1f} s/GB",
            f"{row.import_gb_s:.2f} GB/s",
            f"{row.import_cpu_s_per_gb:.1f} s/GB",
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args(sys.argv[1:])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for dtype in _DTYPES:

            def normal(store: SessionStore, dtype: torch.dtype = dtype) -> None:
                save_normal(store, dtype, options.mib << 20)

            def recall(store: SessionStore, dtype: torch.dtype = dtype) -> None:
                save_recall(store, dtype, options.tokens)

            for what, save in (("normal numbers", normal), ("recall model", recall)):
                folder = Path(directory) / f"{len(rows)}"
                rows.append(measure(what, dtype, save, options.rounds, folder))
    show(rows)
    if options.json is not None:
        machine = {"machine": platform.machine(), "num_cpus": os.cpu_count()}
        found = {**machine, "zstd": ".".join(map(str, zstandard.ZSTD_VERSION))}
        result = {**found, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
