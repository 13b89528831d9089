"""``offload video ask``: ask about a stream that was saved, from any process."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from offload.errors import ConfigError
from offload.video.answer_files import AnswerFile
from offload.video.answerer import Answerer
from offload.video.cli_common import (
    add_model_options,
    add_retrieval_options,
    open_adapter,
    open_root,
    plan_of,
    stream_options,
)
from offload.video.evidence import clock, draw_all
from offload.video.question_files import read_questions, typed_question
from offload.video.stream_session import StreamSession
from offload.video.types import Answer, Question

_SHOWN = 4


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    """Register the command."""
    text = "Ask about a saved stream: typed questions, one from the line, or those of a file."
    parser = kinds.add_parser(name, help="ask about a saved stream", description=text)
    parser.add_argument("name", help="of the stream")
    add_question_options(parser)
    add_retrieval_options(parser)
    add_model_options(parser)


def add_question_options(parser: argparse.ArgumentParser) -> None:
    """Add what is asked, and where answers go."""
    parser.add_argument("--question", metavar="TEXT", help="ask this; '/at 12:30 ...' at a time")
    text = "JSON, JSONL or lines of text, with the times at which they are asked"
    parser.add_argument("--questions", type=Path, metavar="FILE", help=text)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append answers as JSONL")
    text = "draw the frames that answers rest on, and when they were, into this folder"
    parser.add_argument("--evidence", type=Path, metavar="DIR", help=text)


def run(args: argparse.Namespace) -> None:
    """Answer.

    Raises
    ------
    ConfigError
        There is no such stream, or a question cannot be read.
    """
    adapter, store = open_adapter(args), open_root(args)
    try:
        session = StreamSession.load(adapter, args.name, store, **stream_options(args))
        try:
            answerer = Answerer(session.stream, plan_of(args), max_tokens=args.max_tokens)
            with Report(args, session) as report:
                for question in report.unanswered(questions_of(args)):
                    report.add(answerer.ask(question))
        finally:
            session.close()
    finally:
        store.close()


def questions_of(args: argparse.Namespace) -> Iterator[Question]:
    """Yield what is asked: of the line, of the file, or as it is typed."""
    if args.question is not None:
        yield typed_question(args.question, "q1")
        return
    if args.questions is not None:
        yield from read_questions(args.questions)
        return
    console = Console(stderr=True)
    number = 0
    while True:
        if sys.stdin.isatty():
            console.print("> ", end="")
        line = sys.stdin.readline()
        if not line or line.strip() in ("/quit", "/exit"):
            return
        if not line.strip():
            continue
        number += 1
        try:
            yield typed_question(line, f"q{number}")
        except ConfigError as error:
            console.print(str(error), markup=False)


class Report:
    """Where answers go: the terminal, a file, pictures."""

    def __init__(self, args: argparse.Namespace, session: StreamSession) -> None:
        self._args = args
        self._stream = session.stream
        self._name = session.name
        self._console = Console(markup=False, highlight=False)
        self._opened = ExitStack()
        self._file: AnswerFile | None = None

    def __enter__(self) -> "Report":
        if self._args.out is not None:
            self._file = self._opened.enter_context(AnswerFile(self._args.out))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._opened.close()

    def unanswered(self, questions: Iterator[Question]) -> Iterator[Question]:
        """Leave out those that have an answer in the file."""
        done = frozenset[str]() if self._file is None else self._file.done
        return (question for question in questions if question.id not in done)

    def add(self, answer: Answer) -> None:
        """Show, write and draw an answer."""
        asked = answer.question
        when = "" if asked.time_s is None else f" [{clock(asked.time_s)}]"
        self._console.print(f"{asked.id}{when} {asked.text}\n  {answer.text}")
        frames = ", ".join(f"{clock(e.time_s)} ({e.score:.0%})" for e in answer.evidence[:_SHOWN])
        read = ", ".join(
            f"{count / 2**20:.2f} MiB {tier}" for tier, count in answer.bytes_from.items()
        )
        timing = f"{answer.timings_ms['first_token']:.0f} ms to the first token"
        self._console.print(f"  from {frames or 'no frame'}; {timing}; read {read or 'nothing'}")
        if self._file is not None:
            self._file.append(answer, video_id=self._name)
        if self._args.evidence is not None:
            end_s = self._stream.units.places[-1].time_s
            draw_all([answer], self._stream.thumbnails, self._args.evidence, end_s)
