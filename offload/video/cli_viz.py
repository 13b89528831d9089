"""``offload video viz``: draw the evidence of answers that were written earlier."""

import argparse
from pathlib import Path

from rich.console import Console

from offload.sessions.store import SessionStore
from offload.video.answer_files import read_answers
from offload.video.cli_common import add_root_option
from offload.video.evidence import draw_all
from offload.video.stream_session import read_pictures


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    """Register the command."""
    text = "Draw the frames that answers rest on, and when they were shown."
    parser = kinds.add_parser(name, help="draw the evidence of answers", description=text)
    parser.add_argument("name", help="of the stream")
    parser.add_argument("answers", type=Path, help="a file that `offload video ask --out` wrote")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    add_root_option(parser)


def run(args: argparse.Namespace) -> None:
    """Draw a sheet of frames and a timeline for each answer; no model is needed.

    Raises
    ------
    ConfigError
        There is no such stream or file, or Pillow or matplotlib are missing.
    """
    answers = [record.answer for record in read_answers(args.answers)]
    with SessionStore(args.root) as store:
        thumbnails, end_s = read_pictures(args.name, store)
    made = draw_all(answers, thumbnails, args.folder, end_s)
    Console(markup=False).print("\n".join(map(str, made)))
