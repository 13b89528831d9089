"""``offload video run``: encode a source and answer while it plays, in one process."""

import argparse
import sys
from contextlib import ExitStack, closing

from offload.errors import ConfigError
from offload.video.answerer import Answerer
from offload.video.cli_ask import add_question_options, questions_of
from offload.video.cli_common import (
    add_model_options,
    add_retrieval_options,
    add_source_options,
    ended_by_signals,
    open_adapter,
    open_frames,
    plan_of,
    stream_options,
)
from offload.video.cli_progress import Progress
from offload.video.cli_report import Report, add_report_options
from offload.video.encoder import StreamEncoder
from offload.video.playing import in_pieces, play
from offload.video.question_socket import QuestionSocket
from offload.video.stream import VideoStream


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    """Register the command."""
    text = "Encode a stream and answer each question when its time has come."
    parser = kinds.add_parser(name, help="encode and ask in one process", description=text)
    add_source_options(parser)
    add_question_options(parser)
    add_report_options(parser)
    add_retrieval_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Encode and answer, until the source ends, or Ctrl-C.

    Raises
    ------
    ConfigError
        There are no questions.
    """
    if args.question is None and args.questions is None and args.listen is None:
        raise ConfigError(
            "what is to be asked? --question, --questions or --listen; or encode, then ask"
        )
    with ExitStack() as opened:
        asked = None
        if args.listen is not None:
            asked = opened.enter_context(QuestionSocket(args.listen))
            print(f"questions are answered at {asked.address}", file=sys.stderr, flush=True)
        adapter = open_adapter(args)
        stream = opened.enter_context(closing(VideoStream(adapter, **stream_options(args))))
        answerer = Answerer(stream, plan_of(args, adapter), max_tokens=args.max_tokens)
        report = opened.enter_context(Report(args.source, args.out, args.evidence))
        opened.enter_context(ended_by_signals())
        _play(args, answerer, stream, report, asked)


def _play(
    args: argparse.Namespace,
    answerer: Answerer,
    stream: VideoStream,
    report: Report,
    asked: QuestionSocket | None,
) -> None:
    encoder = StreamEncoder(stream, args.window)
    questions = {each.id: each for each in filter(report.is_new, questions_of(args))}
    with open_frames(args) as source, Progress(source, stream, args.source) as progress:
        answers = play(
            in_pieces(source),
            encoder,
            answerer,
            questions.values(),
            arriving=tuple if asked is None else asked.take_all,
            advance=progress.advance,
        )
        for answer in answers:
            report.add(answer, stream)
            if asked is not None and answer.question.id not in questions:
                asked.give(answer, video_id=args.source)
