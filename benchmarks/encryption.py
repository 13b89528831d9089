"""What encryption costs: of AES itself, of a disk tier, and of saving and loading a session.

Everything once without and once with a key, in turns, and the median of some rounds.

    python -m benchmarks.encryption [--mib 256] [--rounds 5] [--directory DIR]
"""

import argparse
import secrets
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from offload.sessions.keys import record_id
from offload.sessions.namespace import make_namespace
from offload.sessions.saving import Content
from offload.sessions.store import SessionStore
from offload.tiers.disk import DiskTier
from offload.tiers.pool import page_aligned
from offload.tiers.sealing import SALT_BYTES, TAG_BYTES, Sealer
from offload.tiers.transfer import CompletedTransfer, Transfer
from offload.types import ChunkInfo, ChunkLayout

_LAYOUT = ChunkLayout(8, 64, 128, 128, torch.bfloat16)
"""Records of 256 KiB, in eight units of 32 KiB."""
_LAYERS = tuple(range(8))
_UNIT_BYTES = 32 << 10
_WAIT_S = 120.0
_MODEL = {"config": "c", "rotary": "r", "weights": "w", "dtype": "bfloat16"}

Times = dict[tuple[str, bool], list[float]]


@contextmanager
def timed(times: Times, what: str, is_sealed: bool) -> Iterator[None]:
    """Note how long a block takes."""
    started = time.perf_counter()
    yield
    times[what, is_sealed].append(time.perf_counter() - started)


def measure_cipher(num_bytes: int, times: Times) -> None:
    """Seal and open units on one thread, copies included."""
    box = Sealer.of_this_process().box("benchmark", bytes(SALT_BYTES))
    unit, numbers = secrets.token_bytes(_UNIT_BYTES), range(num_bytes // _UNIT_BYTES)
    with timed(times, "seal units, one thread", True):
        sealed = [box.seal(number, unit, b"") for number in numbers]
    own = [(memoryview(bytearray(each[:-TAG_BYTES])), each[-TAG_BYTES:]) for each in sealed]
    with timed(times, "open units, one thread", True):
        is_good = all(box.open_in_place(n, *own[n], b"") for n in numbers)
    assert is_good


def measure_tier(folder: Path, chunks: Tensor, times: Times, sealer: Sealer | None) -> None:
    """Write chunks to a disk tier, and read them."""
    num, is_sealed = len(chunks), sealer is not None
    tier = DiskTier(folder, capacity_bytes=1 << 40, layout=_LAYOUT, num_threads=4, sealer=sealer)
    with closing(tier):
        infos = [ChunkInfo(i, 0, i * _LAYOUT.chunk_tokens) for i in range(num)]
        slots = tier.allocate(num)
        with timed(times, "disk tier, write", is_sealed):
            tier.write(slots, infos, list(chunks)).wait(_WAIT_S)
        out = page_aligned(chunks.numel()).view(chunks.shape)
        out.fill_(1)  # whose pages are there before the clock runs
        with timed(times, "disk tier, read", is_sealed):
            tier.read(slots, infos, list(out)).wait(_WAIT_S)
        assert torch.equal(out, chunks)


def measure_session(folder: Path, chunks: Tensor, times: Times, key: bytes | None) -> None:
    """Save a session to a new store, open it, and read all of it."""
    columns = [tuple(range(i, i + len(_LAYERS))) for i in range(0, len(chunks), len(_LAYERS))]

    def read(numbers: Sequence[int], out: Sequence[Tensor]) -> Transfer:
        for number, buffer in zip(numbers, out, strict=True):
            buffer.copy_(chunks[number])
        return CompletedTransfer(len(numbers) * _LAYOUT.slot_bytes)

    num_tokens = len(columns) * _LAYOUT.chunk_tokens
    tail = torch.zeros(1, _LAYOUT.num_kv_heads, 0, _LAYOUT.row_dim, dtype=_LAYOUT.dtype)
    content = Content(
        namespace=make_namespace(_MODEL, _LAYOUT, list(_LAYERS), ""),
        layout=_LAYOUT,
        layers=_LAYERS,
        num_tokens=num_tokens,
        rows=[columns],
        read=read,
        token_ids=torch.arange(num_tokens)[None],
        tensors={f"tail.{layer}": tail for layer in _LAYERS},
        state={},
        known={},
    )
    is_sealed = key is not None
    with SessionStore(folder, quota=1 << 40, min_free=0, key=key) as store:
        with timed(times, "session, save", is_sealed):
            store.save("chat", content).held.release()
        with timed(times, "session, open and read", is_sealed):
            _read_session(store, folder)


def _read_session(store: SessionStore, folder: Path) -> None:
    file, held = store.open("chat")
    infos, slots = [], []
    scratch = folder.with_name(folder.name + "-scratch")
    tier = DiskTier(scratch, capacity_bytes=0, layout=_LAYOUT, num_threads=4)
    with closing(tier):
        for position, ref in enumerate(file.rows[0]):
            for number, layer in enumerate(file.layers):
                path, index = held.place(ref, number)
                slots += tier.adopt(path, held.fingerprint, [index], held.sealer)
                first_token = position * _LAYOUT.chunk_tokens
                infos.append(ChunkInfo(record_id(ref.key), layer, first_token))
        out = page_aligned(len(slots) * _LAYOUT.slot_bytes).view(len(slots), -1)
        tier.read(slots, infos, list(out)).wait(_WAIT_S)
    held.release()


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.encryption")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path)
    args = parser.parse_args(argv)
    num_bytes = args.mib << 20
    chunks = page_aligned(num_bytes).view(-1, _LAYOUT.slot_bytes)
    chunks.copy_(torch.randint(0, 256, chunks.shape, dtype=torch.uint8))
    times: Times = defaultdict(list)
    for _ in range(args.rounds):
        measure_cipher(num_bytes, times)
        for is_sealed in (False, True):
            with tempfile.TemporaryDirectory(dir=args.directory) as name:
                sealer = Sealer.of_this_process() if is_sealed else None
                measure_tier(Path(name) / "tier", chunks, times, sealer)
                key = secrets.token_bytes(32) if is_sealed else None
                measure_session(Path(name) / "root", chunks, times, key)
    report(times, num_bytes, print)
    return 0


def report(times: Times, num_bytes: int, say: Callable[[str], object]) -> None:
    """Print the median rate of everything, in GB/s and seconds."""
    say(f"{'':26}{'plain':>20}{'encrypted':>20}")
    for what in dict.fromkeys(what for what, _ in times):
        cells = []
        for is_sealed in (False, True):
            found = times.get((what, is_sealed))
            seconds = statistics.median(found) if found else 0.0
            cells.append(f"{num_bytes / seconds / 1e9:.2f} GB/s {seconds:.3f} s" if found else "-")
        say(f"{what:26}{cells[0]:>20}{cells[1]:>20}")


if __name__ == "__main__":
    sys.exit(main())
