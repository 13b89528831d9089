"""Sessions in an object store: MB/s up and down, and a restore against the prefill that it saves.

Sessions of normally distributed numbers in chunks of an 8B model with GQA, published and fetched,
with and without compression; each fetch goes to an empty store. Rates count payload bytes, the best
of some rounds. With a delay, every request waits so long first, as one to another region does. Then
the shipped recall model reads a document, which is published, fetched, and asked for one token. An
S3 server of tests takes its turn, too; it is written in Python, so its rates are bounds of the
server, not of a store.

    python -m benchmarks.remote [--mib 128] [--tokens 4096] [--rounds 3] [--directory DIR]
        [--delay-ms 20] [--threads 32] [--json FILE]
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.session_archive import save_normal
from offload import OffloadedCache, SessionStore
from offload.prefill import prefill
from offload.recall_data import build_document
from offload.recall_model import load_recall_model
from offload.sessions.remote_sessions import RemoteSessions
from offload.tiers.remote_bucket import Bucket
from tests.support.s3_server import BUCKET, s3_options, s3_server

_MB = 1e6
_NAME = "session"
_PIECE_TOKENS = 512


@dataclass(frozen=True)
class Row:
    """One kind of store. Rates count payload bytes."""

    store: str
    compress: bool
    delay_ms: float
    payload_mib: float
    stored_share: float
    up_mb_s: float
    up_cpu_s_per_gb: float
    again_s: float
    down_mb_s: float
    down_cpu_s_per_gb: float


@dataclass(frozen=True)
class Restore:
    """A document that came back from a store, against reading it again. Seconds."""

    store: str
    num_tokens: int
    payload_mib: float
    prefill_s: float
    publish_s: float
    fetch_s: float
    load_s: float
    first_token_s: float
    is_same_token: bool

    @property
    def gain(self) -> float:
        """How many times faster than the prefill."""
        return self.prefill_s / (self.fetch_s + self.load_s)


class SlowBucket(Bucket):
    """A bucket of which every object is a while away."""

    delay_s = 0.0

    def _call(self, verb: str, name: str, call: Any, **how: Any) -> Any:
        time.sleep(self.delay_s)
        return super()._call(verb, name, call, **how)


MakeBucket = Callable[[str], Bucket]


@contextmanager
def stores(folder: Path, delay_ms: float) -> Iterator[dict[str, tuple[float, MakeBucket]]]:
    """Yield delay and opener of every kind of store there is."""

    def local(prefix: str) -> Bucket:
        return Bucket((folder / prefix).as_uri())

    def slow(prefix: str) -> Bucket:
        bucket = SlowBucket((folder / prefix).as_uri())
        bucket.delay_s = delay_ms / 1000
        return bucket

    kinds: dict[str, tuple[float, MakeBucket]] = {"folder": (0.0, local)}
    kinds["folder, far"] = (delay_ms, slow)
    with s3_server() as port:
        kinds["moto (S3)"] = (
            0.0,
            lambda prefix: Bucket(f"s3://{BUCKET}/{prefix}", options=s3_options(port)),
        )
        yield kinds


def measure(
    kind: str, delay_ms: float, make: MakeBucket, compress: bool, options: argparse.Namespace
) -> Row:
    folder = Path(tempfile.mkdtemp(dir=options.directory))
    ups, downs, again_s, report = [], [], 0.0, None
    try:
        with SessionStore(folder / "root", quota="8GiB", min_free=0) as store:
            save_normal(store, torch.bfloat16, options.mib << 20)
            for number in range(options.rounds):
                with RemoteSessions(
                    make(uuid.uuid4().hex), compress=compress, num_threads=options.threads
                ) as remote:
                    cpu_s = time.process_time()
                    report = remote.publish(store, _NAME)
                    ups.append((report.seconds, time.process_time() - cpu_s))
                    again_s = remote.publish(store, _NAME).seconds
                    target = folder / f"fetched-{number}"
                    with SessionStore(target, quota="8GiB", min_free=0) as other:
                        cpu_s = time.process_time()
                        fetched = remote.fetch(other, _NAME)
                        downs.append((fetched.seconds, time.process_time() - cpu_s))
                    shutil.rmtree(target)
    finally:
        shutil.rmtree(folder)
    assert report is not None
    size, up, down = report.content_bytes, min(ups), min(downs)
    return Row(
        store=kind,
        compress=compress,
        delay_ms=delay_ms,
        payload_mib=size / 2**20,
        stored_share=report.written_bytes / size,
        up_mb_s=size / up[0] / _MB,
        up_cpu_s_per_gb=1e9 * up[1] / size,
        again_s=again_s,
        down_mb_s=size / down[0] / _MB,
        down_cpu_s_per_gb=1e9 * down[1] / size,
    )


def restore(kind: str, make: MakeBucket, options: argparse.Namespace) -> Restore:
    """Read a document once, and then have it back on another machine's disk."""
    folder = Path(tempfile.mkdtemp(dir=options.directory))
    model, _ = load_recall_model()
    ids = torch.tensor([build_document(options.tokens, 4, 0).token_ids])
    capacity = {"gpu": "2GiB", "cpu": "2GiB", "disk": "2GiB"}
    with OffloadedCache(["gpu"], capacity={"gpu": "2GiB"}) as cache:
        prefill(model, cache, ids[:, :_PIECE_TOKENS], _PIECE_TOKENS, lambda n: None)  # warms up
    try:
        with (
            SessionStore(folder / "a", quota="8GiB", min_free=0) as store,
            SessionStore(folder / "b", quota="8GiB", min_free=0) as other,
            RemoteSessions(make(uuid.uuid4().hex), num_threads=options.threads) as remote,
        ):
            with OffloadedCache(
                ["gpu", "cpu", "disk"], capacity=capacity, disk_path=folder / "disk"
            ) as cache:
                started = time.perf_counter()
                prefill(model, cache, ids, _PIECE_TOKENS, lambda n: None)
                prefill_s = time.perf_counter() - started
                cache.save(_NAME, store=store, model=model, token_ids=ids)
                expected = next_token(model, cache, ids)
            published = remote.publish(store, _NAME)
            fetched = remote.fetch(other, _NAME)
            started = time.perf_counter()
            loaded = OffloadedCache.load(
                _NAME, model, store=other, capacity=capacity, disk_path=folder / "disk"
            )
            load_s = time.perf_counter() - started
            with loaded:
                started = time.perf_counter()
                found = next_token(model, loaded, ids)
                first_s = time.perf_counter() - started
    finally:
        shutil.rmtree(folder)
    return Restore(
        store=kind,
        num_tokens=ids.shape[1],
        payload_mib=published.content_bytes / 2**20,
        prefill_s=prefill_s,
        publish_s=published.seconds,
        fetch_s=fetched.seconds,
        load_s=load_s,
        first_token_s=first_s,
        is_same_token=found == expected,
    )


def next_token(model: Any, cache: OffloadedCache, ids: torch.Tensor) -> int:
    prompt = torch.cat([ids, ids[:, :1]], 1)
    mask = torch.ones_like(prompt)
    tokens = model.generate(
        prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=1, do_sample=False
    )
    return int(tokens[0, -1])


def show(rows: list[Row], restores: list[Restore]) -> None:
    table = Table(show_edge=False, header_style="bold")
    for title in ("store", "zstd", "delay", "stored", "up", "CPU", "again", "down", "CPU"):
        table.add_column(title, justify="left" if title == "store" else "right")
    for row in rows:
        table.add_row(
            row.store,
            "yes" if row.compress else "no",
            f"{row.delay_ms:.0f} ms",
            f"{row.stored_share:.2f}",
            f"{row.up_mb_s:.0f} MB/s",
            f"{row.up_cpu_s_per_gb:.1f} s/GB",
            f"{row.again_s:.2f} s",
            f"{row.down_mb_s:.0f} MB/s",
            f"{row.down_cpu_s_per_gb:.1f} s/GB",
        )
    console = Console(width=120)
    console.print(table)
    for each in restores:
        console.print(
            f"{each.store}: {each.num_tokens} tokens ({each.payload_mib:.0f} MiB): prefill "
            f"{each.prefill_s:.2f} s; published in {each.publish_s:.2f} s, fetched in "
            f"{each.fetch_s:.2f} s, loaded in {each.load_s:.2f} s: {each.gain:.1f} times faster, "
            f"same token: {each.is_same_token}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args(sys.argv[1:])
    with (
        tempfile.TemporaryDirectory(dir=options.directory) as folder,
        stores(Path(folder), options.delay_ms) as kinds,
    ):
        rows = [
            measure(kind, delay_ms, make, compress, options)
            for kind, (delay_ms, make) in kinds.items()
            for compress in (True, False)
        ]
        restores = [restore(kind, make, options) for kind, (_, make) in kinds.items()]
    show(rows, restores)
    if options.json is not None:
        machine = {"machine": platform.machine(), "num_cpus": os.cpu_count()}
        found = {"rows": [asdict(row) for row in rows], "restores": list(map(asdict, restores))}
        options.json.write_text(json.dumps({**machine, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
