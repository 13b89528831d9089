"""Answers about a stream of BadgeWorld, by how frames are chosen, with everything on disk.

One encoding of a real H.264 file with a sliding window, and all questions on it in every mode. The
window alone cannot answer; full attention is out of what the model was trained for. ``first``: the
true frame is the first of the evidence; ``read``: bytes from disk for one question.

    python -m benchmarks.badge_world [--frames 1000] [--seeds 0 1] [--phrase TEXT] [--json FILE]
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from offload.bench.outputs import write_figures
from offload.video.answerer import Answerer
from offload.video.badge_adapter import badge_adapter
from offload.video.badge_world import PHRASES, make_stream, write_mp4
from offload.video.encoder import StreamEncoder
from offload.video.retrieval import Mode, RetrievalPlan
from offload.video.sources import open_source
from offload.video.stream import VideoStream
from offload.video.types import Question

_WINDOW_FRAMES = 24
_TOKENS_PER_FRAME = 4
_CHOICES: tuple[tuple[Mode, int, int], ...] = (
    ("recent", _WINDOW_FRAMES, 0),
    ("uniform", 16, 0),
    ("rekv", 4, 0),
    ("rekv", 8, 0),
    ("rekv", 16, 0),
    ("tokmax", 4, 1),
    ("tokmax", 8, 1),
    ("tokmax", 16, 1),
    ("oracle", 8, 0),
)


@dataclass(frozen=True)
class Row:
    """One way to choose frames, over all questions of all streams."""

    mode: str
    num_units: int
    num_questions: int
    accuracy: float
    first: float
    first_token_ms: float
    disk_kib: float


def ask_all(
    stream: VideoStream, questions: Sequence[Question], mode: Mode, units: int, recent: int
) -> list[tuple[bool, bool, float, float]]:
    """Return, for each question, whether it was right, and its evidence; milliseconds and KiB."""
    found = []
    for question in questions:
        choose = _truth(question) if mode == "oracle" else None
        plan = RetrievalPlan(mode, units, recent, choose=choose)
        answer = Answerer(stream, plan, max_tokens=2).ask(question)
        [window] = question.windows
        is_first = bool(answer.evidence) and window[0] <= answer.evidence[0].time_s <= window[1]
        kib = answer.bytes_from.get("disk", 0) / 1024
        found.append(
            (answer.text == question.answer, is_first, answer.timings_ms["first_token"], kib)
        )
    return found


def _truth(question: Question) -> Callable[[str, int], list[float]]:
    [(start, end)] = question.windows
    return lambda _text, count: [float(start <= second < end) for second in range(count)]


def measure(frames: int, seeds: Sequence[int], phrase: str = PHRASES[0]) -> list[Row]:
    """Encode each stream once, and ask everything in every mode."""
    found: dict[tuple[Mode, int, int], list[tuple[bool, bool, float, float]]] = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            pictures, questions = make_stream(frames, seed, phrase)
            video = Path(folder) / "badges.mp4"
            write_mp4(video, pictures)
            sizes: dict[str, int | str] = {"gpu": "192KiB", "disk": "1GiB"}
            stream = VideoStream(
                badge_adapter(), tiers=list(sizes), capacity=sizes, disk_path=folder
            )
            encoder = StreamEncoder(stream, _WINDOW_FRAMES * _TOKENS_PER_FRAME)
            with open_source(video) as source, tqdm(total=frames, unit="frame") as bar:
                for count in encoder.extend(source):
                    bar.update(count)
            stream.store.flush()
            for choice in tqdm(_CHOICES, unit="mode"):
                found.setdefault(choice, []).extend(ask_all(stream, questions, *choice))
            stream.close()
    return [_row(*choice[:2], results) for choice, results in found.items()]


def _row(mode: str, units: int, results: Sequence[tuple[bool, bool, float, float]]) -> Row:
    right, first, times, read = zip(*results, strict=True)
    return Row(mode, units, len(results), mean(right), mean(first), median(times), median(read))


def report(rows: Sequence[Row]) -> Table:
    """Return the table."""
    table = Table(title="BadgeWorld, everything on disk")
    for name in ("mode", "frames read", "questions", "right", "true frame first", "ms", "disk KiB"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in rows:
        table.add_row(
            row.mode,
            str(row.num_units),
            str(row.num_questions),
            f"{row.accuracy:.1%}",
            f"{row.first:.1%}",
            f"{row.first_token_ms:.0f}",
            f"{row.disk_kib:.0f}",
        )
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    text = "how to ask: %(choices)s"
    parser.add_argument("--phrase", choices=PHRASES, default=PHRASES[0], metavar="TEXT", help=text)
    parser.add_argument("--json", type=Path, help="write all figures")
    options = parser.parse_args(sys.argv[1:])
    rows = measure(options.frames, options.seeds, options.phrase)
    Console(width=110).print(report(rows))
    write_figures(options.json, rows)


if __name__ == "__main__":
    main()
