"""``offload video run``: encode a stream and ask while it plays, in one process."""

import argparse
import math

from tqdm import tqdm

from offload.errors import ConfigError
from offload.video.answerer import Answerer
from offload.video.cli_ask import Report, add_question_options, questions_of
from offload.video.cli_common import (
    add_model_options,
    add_retrieval_options,
    add_source_options,
    open_adapter,
    open_frames,
    open_root,
    plan_of,
    stream_options,
)
from offload.video.encoder import StreamEncoder
from offload.video.playing import play
from offload.video.stream import VideoStream
from offload.video.stream_session import StreamSession
from offload.video.types import Question


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    """Register the command."""
    text = "Encode a stream and answer each question when its time has come."
    parser = kinds.add_parser(name, help="encode and ask in one process", description=text)
    add_source_options(parser)
    add_question_options(parser)
    add_retrieval_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Encode and answer.

    Raises
    ------
    ConfigError
        There are no questions.
    """
    if args.question is None and args.questions is None:
        raise ConfigError("what is to be asked? --question or --questions; or encode, then ask")
    adapter, store = open_adapter(args), open_root(args)
    try:
        session = StreamSession(VideoStream(adapter, **stream_options(args)), args.source, store)
        try:
            _play(args, session)
        finally:
            session.close()
    finally:
        store.close()


def _play(args: argparse.Namespace, session: StreamSession) -> None:
    encoder = StreamEncoder(session.stream, args.window)
    answerer = Answerer(session.stream, plan_of(args), max_tokens=args.max_tokens)
    with Report(args, session) as report, open_frames(args) as source, tqdm(unit="frame") as bar:
        asked = sorted(report.unanswered(questions_of(args)), key=_ask_time_s)
        for answer in play(source, encoder, answerer, asked, advance=bar.update):
            report.add(answer)


def _ask_time_s(question: Question) -> float:
    return math.inf if question.time_s is None else question.time_s
