"""``offload video ask``: ask about a stream that was saved, from any process."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from rich.console import Console

from offload.errors import ConfigError, OffloadError
from offload.sessions.store import SessionStore
from offload.video.answerer import Answerer
from offload.video.cli_common import (
    add_model_options,
    add_retrieval_options,
    add_root_option,
    ended_by_signals,
    open_adapter,
    plan_of,
    stream_options,
)
from offload.video.cli_report import Report, add_report_options
from offload.video.listening import Address
from offload.video.question_files import read_questions, typed_question
from offload.video.question_socket import QuestionSocket
from offload.video.stream_follower import StreamFollower
from offload.video.types import Answer, Question


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    """Register the command."""
    text = "Ask about a saved stream: typed questions, one from the line, or those of a file."
    parser = kinds.add_parser(name, help="ask about a saved stream", description=text)
    parser.add_argument("name", help="of the stream")
    add_question_options(parser)
    text = "look so often whether more of the stream was saved (default: %(default)s)"
    parser.add_argument("--refresh", type=float, default=10.0, metavar="S", help=text)
    add_report_options(parser)
    add_retrieval_options(parser)
    add_root_option(parser)
    add_model_options(parser)


def add_question_options(parser: argparse.ArgumentParser) -> None:
    """Add what is asked."""
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--question", metavar="TEXT", help="ask this; '/at 12:30 ...' at a time")
    text = "JSON, JSONL or lines of text, with the times at which they are asked"
    asked.add_argument("--questions", type=Path, metavar="FILE", help=text)
    text = "take questions as JSONL at 127.0.0.1:PORT or unix:PATH, from several clients"
    parser.add_argument("--listen", metavar="ADDRESS", help=text)


def run(args: argparse.Namespace) -> None:
    """Answer.

    Raises
    ------
    ConfigError
        There is no such stream, or a question cannot be read.
    """
    questions = questions_of(args)
    if args.listen is not None:
        Address.parse(args.listen)  # a mistake is told before the model is loaded
    with SessionStore(args.root) as store:
        store.info(args.name)  # before the model, which takes longer
        adapter = open_adapter(args)
        follower = StreamFollower(
            adapter, args.name, store, refresh_s=args.refresh, **stream_options(args)
        )
        plan = plan_of(args, adapter)
        with closing(follower), Report(args.name, args.out, args.evidence) as report:

            def ask(question: Question) -> Answer:
                follower.refresh()
                stream = follower.session.stream
                answer = Answerer(stream, plan, max_tokens=args.max_tokens).ask(question)
                report.add(answer, stream)
                return answer

            for question in filter(report.is_new, questions):
                ask(question)
            if args.listen is not None:
                _serve(args.listen, args.name, ask)


def questions_of(args: argparse.Namespace) -> Iterator[Question]:
    """Return what is asked: of the line, of the file, or, if nobody listens, as it is typed.

    Raises
    ------
    ConfigError
        The line or the file has a mistake.
    """
    if args.question is not None:
        return iter([typed_question(args.question, "q1")])
    if args.questions is not None:
        return iter(read_questions(args.questions))
    return iter(()) if args.listen is not None else _typed()


def _serve(address: str, name: str, ask: Callable[[Question], Answer]) -> None:
    """Answer whoever asks, until Ctrl-C or SIGTERM."""
    with QuestionSocket(address) as asked, ended_by_signals():
        print(f"{name}: questions are answered at {asked.address}", file=sys.stderr, flush=True)
        while True:
            question = asked.take()
            try:
                asked.give(ask(question), video_id=name)
            except OffloadError as error:
                asked.refuse(question, str(error))


def _typed() -> Iterator[Question]:
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
