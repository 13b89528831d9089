"""A live stream through ``offload video encode``, from a TCP source of this machine.

Three streams of BadgeWorld, each from a process of its own. One at its own speed, whose sender
hangs up three times: no frame may be lost. One with damaged bytes: what cannot be decoded is
counted. One that is sent as fast as the line takes it: what is dropped is counted and announced.
A sender sends the bytes of a segment evenly over its length.

    python -m benchmarks.video_live [--minutes 2] [--rate 30] [--json FILE]
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from offload.bench.outputs import write_figures
from offload.cli import main as offload
from offload.video.badge_world import FRAME_SIZE, make_stream
from offload.video.types import Image

_CONNECTIONS = 4
_SHORT_S = 10
_PIECES_PER_S = 100
_TICKS_PER_S = 90_000
_FLIPPED = 60

_SENDER = """
import socket, sys, time
content = open(sys.argv[1], "rb").read()
seconds, connections, per_s = float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
pieces = max(1, round(seconds * per_s))
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    for _ in range(connections):
        peer, _ = listener.accept()
        started = time.monotonic()
        for piece in range(pieces):
            first, end = (len(content) * (piece + k) // pieces for k in (0, 1))
            peer.sendall(content[first:end])
            time.sleep(max(0.0, started + (piece + 1) * seconds / pieces - time.monotonic()))
        peer.shutdown(socket.SHUT_WR)
        peer.recv(1)
        peer.close()
"""
"""Without our imports, which take seconds. Libav and a sender in threads of one process have been
seen to wait for each other."""


@dataclass(frozen=True)
class Row:
    """What became of the frames of one stream."""

    stream: str
    sent: int
    decoded: int
    dropped: int
    encoded: int
    corrupt: int
    reconnects: int
    seconds: float
    frames_per_s: float
    most_behind_s: float
    announced: str


def write_segment(path: Path, images: Sequence[Image], count: int, rate: int) -> Path:
    """Write so many frames, the images again and again, as a transport stream."""
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = rate
        stream.codec_context.time_base = Fraction(1, _TICKS_PER_S)
        for number, image in enumerate(islice(cycle(images), count)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number * _TICKS_PER_S // rate, Fraction(1, _TICKS_PER_S)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def flip_bytes(path: Path) -> Path:
    """Damage the middle of a file."""
    content, generator = bytearray(path.read_bytes()), np.random.default_rng(0)
    for place in generator.integers(len(content) // 3, 2 * len(content) // 3, _FLIPPED):
        content[place] ^= 0x55
    path.write_bytes(content)
    return path


@contextmanager
def sender(path: Path, seconds: float, connections: int = 1) -> Iterator[str]:
    """Start a process that sends a file to whoever connects; yield its address."""
    program = [sys.executable, "-c", _SENDER, str(path)]
    command = [*program, str(seconds), str(connections), str(_PIECES_PER_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"tcp://127.0.0.1:{int(process.stdout.readline())}"
        process.kill()


class _Heard(logging.Handler):
    """Keeps what is announced of drops."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().partition(": ")[2])


def encode(name: str, url: str, sent: int, folder: Path, *options: str) -> Row:
    """Run the command on a source; return what it says became of the frames."""
    stats, heard = folder / f"{name}.json", _Heard()
    log = logging.getLogger("offload.video.live_queue")
    log.addHandler(heard)
    tiers = ["--capacity", "gpu=1MiB,cpu=4MiB,disk=4GiB", "--disk-path", str(folder)]
    common = ["--root", str(folder / "root"), "--stats", str(stats), "--window", "96"]
    status = offload(["video", "encode", name, url, *common, *tiers, "--threads", "1", *options])
    log.removeHandler(heard)
    assert status == 0, f"the command returned {status}"
    found: dict[str, Any] = json.loads(stats.read_text())
    shared = ("decoded", "dropped", "encoded", "corrupt", "reconnects", "seconds", "frames_per_s")
    numbers = {key: found[key] for key in (*shared, "most_behind_s")}
    return Row(name, sent, **numbers, announced="; ".join(heard.messages[:2]))


def measure(minutes: float, rate: int) -> list[Row]:
    """Run the three streams."""
    images = [frame.image for frame in make_stream(2 * rate, 0)[0]]
    # A rate above that of the stream takes every frame.
    every = ["--fps", str(2 * rate), "--reconnect", str(_CONNECTIONS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        length_s = minutes * 60 / _CONNECTIONS
        count = round(length_s * rate)
        segment = write_segment(folder / "steady.ts", images, count, rate)
        with sender(segment, length_s, _CONNECTIONS) as url:
            rows = [encode("steady", url, count * _CONNECTIONS, folder, *every)]
        short_s = min(_SHORT_S, length_s)
        count = round(short_s * rate)
        segment = flip_bytes(write_segment(folder / "damaged.ts", images, count, rate))
        with sender(segment, short_s) as url:
            rows.append(encode("damaged", url, count, folder, *every, "--reconnect", "0"))
        count = round(4 * rate * max(1.0, short_s))
        segment = write_segment(folder / "fast.ts", images, count, rate)
        dropping = ["--policy", "drop_oldest", "--queue", "32", "--reconnect", "0"]
        with sender(segment, 0.0) as url:
            rows.append(encode("fast", url, count, folder, *every, *dropping))
    return rows


def report(rows: Sequence[Row]) -> Table:
    """Return the table."""
    table = Table(title="A live stream through `offload video encode`")
    counted = ("sent", "decoded", "dropped", "encoded", "corrupt", "reconnects")
    for name in ("stream", *counted, "s", "frames/s", "most behind", "announced"):
        table.add_column(name, justify="left" if name in ("stream", "announced") else "right")
    for row in rows:
        numbers = [str(getattr(row, name)) for name in counted]
        times = [f"{row.seconds:.0f}", f"{row.frames_per_s:.0f}", f"{row.most_behind_s:.2f} s"]
        table.add_row(row.stream, *numbers, *times, row.announced)
    return table


def page(rows: Sequence[Row]) -> str:
    """Return the figures as a table in Markdown."""
    names = [field.name for field in fields(Row)]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        values = (getattr(row, name) for name in names)
        lines.append([f"{each:.2f}" if isinstance(each, float) else str(each) for each in values])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of the steady stream")
    parser.add_argument("--rate", type=int, default=30, help="frames per second")
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args(sys.argv[1:])
    rows = measure(options.minutes, options.rate)
    Console(width=160).print(report(rows))
    write_figures(options.json, rows)
    if options.json is not None:
        options.json.with_suffix(".md").write_text(f"# Live video\n\n{__doc__}\n{page(rows)}")


if __name__ == "__main__":
    main()
