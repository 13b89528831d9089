"""``offload video encode`` and ``resume``: put a stream into the store, as it comes."""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tqdm import tqdm

from offload.errors import ConfigError, SessionNotFound
from offload.sessions.store import SessionStore
from offload.video.cli_common import (
    add_model_options,
    add_root_option,
    add_source_options,
    ended_by_signals,
    open_adapter,
    open_frames,
    stream_options,
)
from offload.video.cli_progress import Progress
from offload.video.encoder import StreamEncoder
from offload.video.playing import in_pieces
from offload.video.stream import VideoStream
from offload.video.stream_session import StreamSession
from offload.video.types import Frame

_SAVING_SHARE = 0.05
"""Of the time, at most, that saving takes: what is rewritten by every save grows with the stream,
and the longer a save takes, the later is the next."""


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    """Register the command."""
    texts = {"encode": "encode a stream", "resume": "go on with a stream after its last frame"}
    parser = kinds.add_parser(name, help=texts[name], description=texts[name].capitalize() + ".")
    parser.add_argument("name", help="of the stream, in the store")
    add_source_options(parser)
    text = "save what is encoded every so many seconds, and at the end (default: %(default)s)"
    parser.add_argument("--save-every", type=float, default=10.0, metavar="S", help=text)
    text = "write what became of the frames as JSON"
    parser.add_argument("--stats", type=Path, metavar="FILE", help=text)
    add_root_option(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Encode until the source ends or Ctrl-C; what is encoded by then is saved.

    Raises
    ------
    ConfigError
        There is such a stream already, or none to resume.
    """
    with (
        _session(args) as session,
        open_frames(args) as source,
        Progress(source, session.stream, args.name) as progress,
        ended_by_signals(),
    ):
        try:
            _encode(args, session, in_pieces(source, session.stream.last_s), progress)
        finally:
            session.save()
            _tell(args, progress)


def _tell(args: argparse.Namespace, progress: Progress) -> None:
    figures = progress.figures()
    counted = ", ".join(f"{figures[name]} {name}" for name in ("dropped", "corrupt", "reconnects"))
    tqdm.write(f"{args.name}: {figures['frames']} frames, saved; {counted}")
    if args.stats is not None:
        args.stats.write_text(json.dumps(figures, indent=1) + "\n")


@contextmanager
def _session(args: argparse.Namespace) -> Iterator[StreamSession]:
    """Open model, store and stream: the one of that name, or a new one."""
    with SessionStore(args.root) as store:
        is_new = args.kind == "encode"
        try:
            store.info(args.name)  # before the model, which takes longer
        except SessionNotFound:
            if not is_new:
                raise
        else:
            if is_new:
                raise ConfigError(
                    f"there is a stream {args.name!r}; go on with it: offload video resume"
                )
        adapter, options = open_adapter(args), stream_options(args)
        if is_new:
            session = StreamSession(VideoStream(adapter, **options), args.name, store)
        else:
            session = StreamSession.load(adapter, args.name, store, **options)
        with closing(session):
            yield session


def _encode(
    args: argparse.Namespace,
    session: StreamSession,
    pieces: Iterator[list[Frame]],
    progress: Progress,
) -> None:
    encoder = StreamEncoder(session.stream, args.window)
    next_at = time.monotonic() + args.save_every
    for piece in pieces:
        progress.advance(encoder.add(piece))
        started = time.monotonic()
        if started >= next_at:
            session.save()
            took_s = time.monotonic() - started
            next_at = started + max(args.save_every, took_s / _SAVING_SHARE)
