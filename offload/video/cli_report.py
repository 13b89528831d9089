"""Where answers go: the terminal, a file, pictures."""

import argparse
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from offload.video.answer_files import AnswerFile
from offload.video.evidence import clock, draw_all
from offload.video.stream import VideoStream
from offload.video.types import Answer, Question

_SHOWN = 4


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add where answers go."""
    parser.add_argument("--out", type=Path, metavar="FILE", help="append answers as JSONL")
    text = "draw the frames that answers rest on, and when they were, into this folder"
    parser.add_argument("--evidence", type=Path, metavar="DIR", help=text)


class Report:
    """Shows, writes and draws answers. A context manager.

    Parameters
    ----------
    name : str
        Of the stream, or its source.
    out : Path or None
        A file of answers.
    evidence : Path or None
        A folder for pictures.
    """

    def __init__(self, name: str, out: Path | None, evidence: Path | None) -> None:
        self._name = name
        self._out, self._evidence = out, evidence
        self._console = Console(markup=False, highlight=False)
        self._opened = ExitStack()
        self._file: AnswerFile | None = None

    def __enter__(self) -> "Report":
        if self._out is not None:
            self._file = self._opened.enter_context(AnswerFile(self._out))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._opened.close()

    def is_new(self, question: Question) -> bool:
        """Whether a question has no answer in the file."""
        return self._file is None or question.id not in self._file.done

    def add(self, answer: Answer, stream: VideoStream) -> None:
        """Show, write and draw an answer about a stream."""
        asked = answer.question
        when = "" if asked.time_s is None else f" [{clock(asked.time_s)}]"
        lines = f"{asked.id}{when} {asked.text}\n  {answer.text}\n  {_about(answer)}"
        with tqdm.external_write_mode():  # or they would end up within a line of progress
            self._console.print(lines, soft_wrap=True)
        if self._file is not None:
            self._file.append(answer, video_id=self._name)
        if self._evidence is not None:
            end_s = stream.units.places[-1].time_s
            draw_all([answer], stream.thumbnails, self._evidence, end_s)


def _about(answer: Answer) -> str:
    """Return on what an answer rests, and how long it took."""
    frames = ", ".join(f"{clock(e.time_s)} ({e.score:.0%})" for e in answer.evidence[:_SHOWN])
    read = ", ".join(f"{count / 2**20:.2f} MiB {tier}" for tier, count in answer.bytes_from.items())
    ms = answer.timings_ms
    return (
        f"from {frames or 'no frame'}; {ms['first_token']:.0f} ms to the first token "
        f"(choosing {ms['select']:.0f}, loading {ms['load']:.0f}, model {ms['model']:.0f}); "
        f"read {read or 'nothing'}"
    )
