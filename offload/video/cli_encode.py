"""``offload video encode`` and ``resume``: put a stream into the store, as it comes."""

import argparse
import time
from itertools import dropwhile

from tqdm import tqdm

from offload.errors import ConfigError, SessionNotFound
from offload.sessions.store import SessionStore
from offload.video.adapter import VideoAdapter
from offload.video.cli_common import (
    add_model_options,
    add_source_options,
    open_adapter,
    open_frames,
    open_root,
    stream_options,
)
from offload.video.encoder import StreamEncoder
from offload.video.stream import VideoStream
from offload.video.stream_session import StreamSession


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str) -> None:
    """Register the command."""
    texts = {"encode": "encode a stream", "resume": "go on with a stream after its last frame"}
    parser = kinds.add_parser(name, help=texts[name], description=texts[name].capitalize() + ".")
    parser.add_argument("name", help="of the stream, in the store")
    add_source_options(parser)
    text = "save what is encoded every so many seconds, and at the end (default: %(default)s)"
    parser.add_argument("--save-every", type=float, default=10.0, metavar="S", help=text)
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Encode until the source ends or Ctrl-C; what is encoded by then is saved.

    Raises
    ------
    ConfigError
        There is such a stream already, or none to resume.
    """
    adapter, store = open_adapter(args), open_root(args)
    try:
        session = _open(args, adapter, store)
        try:
            _encode(args, session)
        finally:
            session.close()
    finally:
        store.close()


def _open(args: argparse.Namespace, adapter: VideoAdapter, store: SessionStore) -> StreamSession:
    options = stream_options(args)
    if args.kind == "resume":
        return StreamSession.load(adapter, args.name, store, **options)
    try:
        store.info(args.name)
    except SessionNotFound:
        return StreamSession(VideoStream(adapter, **options), args.name, store)
    raise ConfigError(f"there is a stream {args.name!r}; go on with it: offload video resume")


def _encode(args: argparse.Namespace, session: StreamSession) -> None:
    encoder = StreamEncoder(session.stream, args.window)
    units = session.stream.units
    last_s = units.places[-1].time_s if len(units.places) > 1 else -1.0
    saved_at = started = time.monotonic()
    with open_frames(args) as source, tqdm(unit="frame", desc=args.name) as bar:
        total = source.duration_s
        frames = dropwhile(lambda frame: frame.time_s <= last_s, source)
        try:
            for count in encoder.extend(frames):
                bar.update(count)
                now = time.monotonic()
                stream_s = units.places[-1].time_s - max(0.0, last_s)
                bar.set_postfix(
                    at=f"{units.places[-1].time_s:.0f}s" + (f"/{total:.0f}s" if total else ""),
                    realtime=f"{stream_s / max(1e-9, now - started):.1f}x",
                    dropped=source.stats.dropped,
                )
                if now - saved_at >= args.save_every:
                    session.save()
                    saved_at = time.monotonic()
        finally:
            info = session.save()
    tqdm.write(f"{args.name}: {units.num_frames} frames, {info.num_tokens} tokens a layer, saved")
