"""What the tiers cost a video stream: encoding, a question from a cold disk, an hour of memory.

``encode``: a frame with the tiers, means and thumbnails against the same model and window with a
plain list of tensors, taking turns; medians of the ratios. The text models are BadgeWorld's with
its tower, and two layers of Qwen2 0.5B's shape with 196 tokens a frame and no tower.
``question``: keys and values of the shape of a 7B model (28 layers, 4 KV heads of 128, bfloat16,
196 tokens a frame), all of them on disk; frames are chosen and read by every layer. Queries and
keys are random and the layers have hardly any weights, so the model's time says nothing.
``hour``: 3,600 frames of BadgeWorld through small tiers, saved as they come.

    python -m benchmarks.video_offload [--parts encode question hour] [--json FILE] [--plot FILE]
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from offload.bandwidth import measure_disk
from offload.bench.outputs import write_figures
from offload.sessions.store import SessionStore
from offload.video.adapter import Unit, VideoAdapter
from offload.video.answerer import Answerer
from offload.video.badge_adapter import badge_adapter
from offload.video.badge_model import load_badge_model
from offload.video.badge_world import make_stream
from offload.video.encoder import StreamEncoder
from offload.video.retrieval import Mode, RetrievalPlan
from offload.video.stream import VideoStream
from offload.video.stream_session import StreamSession
from offload.video.thumbnails import Thumbnails
from offload.video.types import Frame, Question
from offload.video.units import UnitPlace

_FRAME_TOKENS = 196
_NVME_GB_S = 7.0
_LIMIT_S = 0.5
_HOUR_FRAMES = 3600
_SAMPLE_FRAMES = 60
_SAVE_FRAMES = 300


@dataclass(frozen=True)
class EncodeRow:
    """Encoding with the tiers against a list of tensors."""

    model: str
    frames_per_turn: int
    turns: int
    offload_ms: float
    plain_ms: float
    ratio: float
    ratio_quartiles: tuple[float, float]


@dataclass(frozen=True)
class QuestionRow:
    """A question whose frames come from the disk; seconds up to the first token, medians."""

    mode: str
    units: int
    mib: float
    over_needed: float
    select_s: float
    load_s: float
    model_s: float
    disk_gb_s: float
    is_direct: bool
    at_disk_s: float
    at_nvme_s: float
    units_in_limit: int


@dataclass(frozen=True)
class HourRow:
    """Memory over a simulated hour, and what saving costs at its end."""

    frames: int
    seconds: float
    first_rss_mib: float
    last_rss_mib: float
    mib_per_hour: float
    fds: tuple[int, int]
    threads: tuple[int, int]
    save_ms: tuple[float, float]
    session_file_kib: float


class TextOnly(VideoAdapter):
    """A random text model; frames are random embeddings, the same each time."""

    name = "random"

    def __init__(self, config: Qwen2Config, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        model: Any = Qwen2Model(config)
        super().__init__(model.to(dtype), load_badge_model()[1])
        self._head = nn.Linear(config.hidden_size, 8, bias=False).to(dtype)
        rows = torch.randn(_FRAME_TOKENS, config.hidden_size)
        self._rows, self._steps = rows.to(dtype), torch.arange(_FRAME_TOKENS)[None]

    @property
    def text_model(self) -> Any:
        return self.model

    @property
    def head(self) -> nn.Module:
        return self._head

    @property
    def unit_tokens(self) -> int:
        return _FRAME_TOKENS

    def encode(self, frames: Sequence[Frame]) -> list[Unit]:
        return [Unit(self._rows, self._steps, _FRAME_TOKENS, frame.time_s, 1) for frame in frames]

    def opening(self) -> list[int]:
        return list(range(14))

    def asking(self, question: str) -> tuple[list[int], list[int]]:
        return list(range(20, 40)), list(range(5))

    def is_end(self, token: int) -> bool:
        return True


class PlainStream(VideoStream):
    """Keeps what layers make of frames in lists, and nothing else."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.kept: defaultdict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.thumbnails = NoThumbnails()

    def append(self, layer: int, keys: Tensor, values: Tensor, places: Sequence[UnitPlace]) -> None:
        if not places[0].num_frames:
            super().append(layer, keys, values, places)
        self.kept[layer].append((keys, values))


class NoThumbnails(Thumbnails):
    """Keeps no pictures."""

    def add(self, frames: Sequence[Frame]) -> None:
        return


def _small(folder: Path) -> dict[str, Any]:
    sizes = {"gpu": "8MiB", "cpu": "8MiB", "disk": "16GiB"}
    return {"tiers": list(sizes), "capacity": sizes, "disk_path": folder}


def _frames(side: int) -> Iterator[Frame]:
    images = np.random.default_rng(0).integers(0, 256, (8, side, side, 3), dtype=np.uint8)
    return (Frame(float(second), image) for second, image in enumerate(cycle(images)))


def measure_encoding(
    name: str,
    adapter: VideoAdapter,
    window: int,
    side: int,
    each: int,
    turns: int,
    folder: Path,
) -> EncodeRow:
    """Encode the same frames both ways, a few at a time, taking turns to be first."""
    with (
        closing(VideoStream(adapter, **_small(folder))) as offloaded,
        closing(PlainStream(adapter, **_small(folder))) as plain,
    ):
        encoders = [StreamEncoder(stream, window) for stream in (offloaded, plain)]
        frames, times = _frames(side), list[list[float]]()
        for turn in range(turns + 2):
            some = list(islice(frames, each))
            spent = [0.0, 0.0]
            for which in (turn % 2, 1 - turn % 2):
                started = time.perf_counter()
                encoders[which].add(some)
                spent[which] = time.perf_counter() - started
            times.append(spent)
    warm = times[2:]
    ratios = sorted(ours / theirs for ours, theirs in warm)
    ours_ms, theirs_ms = (1e3 * median(column) / each for column in zip(*warm, strict=True))
    quartiles = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    return EncodeRow(name, each, turns, ours_ms, theirs_ms, median(ratios), quartiles)


def encode_rows(folder: Path) -> list[EncodeRow]:
    """Measure both models."""
    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=64,
    )
    large = TextOnly(config, torch.float32)
    window = 4 * _FRAME_TOKENS
    return [
        measure_encoding("Qwen2 0.5B, 2 layers", large, window, 384, 4, 16, folder),
        measure_encoding("BadgeWorld", badge_adapter(), 96, 32, 16, 60, folder),
    ]


def _fill(stream: VideoStream, adapter: TextOnly, num_frames: int) -> None:
    config, generator = adapter.config, torch.Generator().manual_seed(0)
    StreamEncoder(stream)
    frames = _frames(8)
    for _ in range(num_frames // 16):
        places = stream.begin(adapter.encode(list(islice(frames, 16))))
        shape = (config.num_key_value_heads, 16 * _FRAME_TOKENS, stream.store.key_dim)
        states = torch.randn(shape, generator=generator).to(adapter.dtype)
        for layer in range(stream.store.num_layers):
            # Every frame another mean, so that layers have a choice.
            shift = torch.randn(shape[0], 16, 1, shape[2], generator=generator)
            keys = states + shift.expand(-1, -1, _FRAME_TOKENS, -1).flatten(1, 2).to(states.dtype)
            stream.append(layer, keys, states, places)
        stream.commit(places)
    stream.store.flush()


def question_rows(folder: Path, num_frames: int = 192, repeats: int = 3) -> list[QuestionRow]:
    """Ask about frames that are all on disk."""
    config = Qwen2Config(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=64,
    )
    config.head_dim = 128
    adapter = TextOnly(config, torch.bfloat16)
    sizes: dict[str, int | str] = {"gpu": "16MiB", "disk": "16GiB"}
    with closing(
        VideoStream(adapter, tiers=list(sizes), capacity=sizes, disk_path=folder)
    ) as stream:
        _fill(stream, adapter, num_frames)
        plans: list[tuple[Mode, int]] = [("tokmax", 64), ("uniform", 64), ("tokmax", 32)]
        return [_ask(stream, mode, units, repeats, folder) for mode, units in plans]


def _ask(stream: VideoStream, mode: Mode, units: int, repeats: int, folder: Path) -> QuestionRow:
    answerer = Answerer(stream, RetrievalPlan(mode, units, 0), max_tokens=1)
    disk = measure_disk(folder)
    answers = [answerer.ask(Question(str(k), "what")) for k in range(repeats)]
    parts = {
        name: median(answer.timings_ms[name] for answer in answers) / 1e3
        for name in ("select", "load", "model")
    }
    num_bytes = median(answer.bytes_from["disk"] for answer in answers)
    config, rate = stream.adapter.config, disk.read_bytes_per_s
    each = config.num_hidden_layers * config.num_key_value_heads * 2 * stream.store.key_dim
    needed = units * _FRAME_TOKENS * each * stream.adapter.dtype.itemsize
    return QuestionRow(
        mode,
        units,
        num_bytes / 2**20,
        num_bytes / needed,
        parts["select"],
        parts["load"],
        parts["model"],
        rate / 1e9,
        disk.is_direct,
        num_bytes / rate,
        num_bytes / (_NVME_GB_S * 1e9),
        int(_LIMIT_S * units / parts["load"]),
    )


def hour_row(folder: Path, plot: Path | None) -> HourRow:
    """Encode an hour of a stream through small tiers, saving it on the way."""
    images = [frame.image for frame in make_stream(600, 0)[0]]
    frames = (Frame(float(k), image) for k, image in zip(range(_HOUR_FRAMES), cycle(images)))
    sizes = {"gpu": "1MiB", "cpu": "4MiB", "disk": "1GiB"}
    options: dict[str, Any] = {"tiers": list(sizes), "capacity": sizes, "disk_path": folder}
    process, samples, saves = psutil.Process(), list[tuple[int, float, int, int]](), list[float]()
    with SessionStore(folder / "root") as store:
        stream = VideoStream(badge_adapter(), **options)
        with closing(StreamSession(stream, "hour", store)) as session:
            encoder, started = StreamEncoder(stream, 96), time.perf_counter()
            for count in range(0, _HOUR_FRAMES, _SAMPLE_FRAMES):
                for _ in range(_SAMPLE_FRAMES // 12):
                    encoder.add(list(islice(frames, 12)))
                rss = process.memory_info().rss / 2**20
                samples.append((count, rss, process.num_fds(), process.num_threads()))
                if (count + _SAMPLE_FRAMES) % _SAVE_FRAMES == 0:
                    saves.append(_timed(session.save))
            seconds = time.perf_counter() - started
            tensors = store.describe("hour").tensors.values()
            file_kib = sum(each.numel() * each.element_size() for each in tensors) / 1024
    # What is loaded once, and the tiers, fill up in the beginning.
    settled = samples[len(samples) // 4 :]
    slope = np.polyfit([each[0] for each in settled], [each[1] for each in settled], 1)[0]
    if plot is not None:
        _draw(samples, plot)
    first, last = settled[0], settled[-1]
    return HourRow(
        _HOUR_FRAMES,
        seconds,
        first[1],
        last[1],
        float(slope) * _HOUR_FRAMES,
        (first[2], last[2]),
        (first[3], last[3]),
        (1e3 * saves[0], 1e3 * saves[-1]),
        file_kib,
    )


def _timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _draw(samples: Sequence[tuple[int, float, int, int]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(6, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([each[0] / 60 for each in samples], [each[1] for each in samples], color="#2a6fbb")
    axes.set_ylim(0, None)
    axes.set_xlabel("minutes of the stream")
    axes.set_ylabel("resident memory, MiB")
    figure.savefig(path, dpi=80)


@contextmanager
def _folder(parent: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)


def main() -> None:
    """Run the benchmark."""
    parts = ("encode", "question", "hour")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--directory", type=Path, help="on the disk to measure")
    parser.add_argument("--json", type=Path, help="write all figures")
    parser.add_argument("--plot", type=Path, help="draw memory over the hour")
    options = parser.parse_args(sys.argv[1:])
    rows: list[EncodeRow | QuestionRow | HourRow] = []
    with _folder(options.directory) as folder:
        if "hour" in options.parts:
            rows.append(hour_row(folder, options.plot))
        if "encode" in options.parts:
            rows += encode_rows(folder)
        if "question" in options.parts:
            rows += question_rows(folder)
    for row in rows:
        Console(width=110).print(row)
    write_figures(options.json, rows)


if __name__ == "__main__":
    main()
