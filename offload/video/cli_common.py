"""What the commands on videos share: model, tiers, source, retrieval."""

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from offload.cli_options import positive_int
from offload.errors import ConfigError
from offload.video.adapter import VideoAdapter
from offload.video.retrieval import RetrievalPlan
from offload.video.source import Source
from offload.video.sources import open_source
from offload.video.unit_scores import read_unit_scores

BADGE = "badge"
MODES = ("tokmax", "rekv", "recent", "uniform")


def add_root_option(parser: argparse.ArgumentParser) -> None:
    """Add where streams are kept."""
    text = "the session store of streams (default: 'sessions' in the user's cache folder)"
    parser.add_argument("--root", type=Path, metavar="DIR", help=text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add which model, and where its states go."""
    text = "a local folder, or badge (default): a small model for badges of BadgeWorld"
    parser.add_argument("--model", default=BADGE, metavar="PATH", help=text)
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="of the model")
    parser.add_argument("--device", metavar="DEVICE", help="of the model (default: CUDA, or CPU)")
    text = "Qwen's models: tokens of two frames, at most (default: 768)"
    parser.add_argument("--frame-tokens", type=positive_int, metavar="N", help=text)
    text = "such as gpu=1GiB,cpu=4GiB,disk=200GiB (default: what is free)"
    parser.add_argument("--capacity", type=_capacity, metavar="SIZES", help=text)
    parser.add_argument("--disk-path", type=Path, metavar="DIR", help="where the disk tier writes")
    text = "threads of torch (default: its own)"
    parser.add_argument("--threads", type=positive_int, metavar="N", help=text)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add what is encoded, and how densely."""
    text = "a video file, a folder of pictures, webcam:0, or an address such as rtsp://..."
    parser.add_argument("source", help=text)
    text = "frames to take per second of the stream (default: %(default)s)"
    parser.add_argument("--fps", type=float, default=1.0, metavar="F", help=text)
    text = "tokens before each frame that it sees, besides the first ones (default: %(default)s)"
    parser.add_argument("--window", type=positive_int, default=15000, metavar="N", help=text)
    text = "play a recording at its own speed"
    parser.add_argument("--realtime", action="store_true", help=text)
    text = "a frame of a live stream that finds the queue full (default: %(default)s)"
    policies = ("block", "drop_oldest", "drop_newest")
    parser.add_argument("--policy", choices=policies, default="block", help=text)
    text = "frames of a live stream that may wait (default: %(default)s)"
    parser.add_argument("--queue", type=positive_int, default=64, metavar="N", help=text)
    text = "times in a row to connect again to a live stream (default: %(default)s)"
    parser.add_argument("--reconnect", type=int, default=5, metavar="N", help=text)


def add_retrieval_options(parser: argparse.ArgumentParser) -> None:
    """Add how frames are chosen."""
    parser.add_argument("--mode", choices=MODES, default="tokmax", help="default: %(default)s")
    text = "choose frames by these scores instead: JSONL of frame, score and perhaps question"
    parser.add_argument("--frames", type=Path, metavar="FILE", help=text)
    text = "frames that a question reads (default: %(default)s)"
    parser.add_argument("--units", type=positive_int, default=8, metavar="N", help=text)
    text = "of them the last ones, always (default: 1; none for rekv)"
    parser.add_argument("--recent", type=int, metavar="N", help=text)
    text = "all layers read the same frames"
    parser.add_argument("--consensus", action="store_true", help=text)
    text = "of an answer, at most (default: %(default)s)"
    parser.add_argument("--max-tokens", type=positive_int, default=32, metavar="N", help=text)


def open_adapter(args: argparse.Namespace) -> VideoAdapter:
    """Load the model.

    Raises
    ------
    ConfigError
        There is none, or none that can be streamed.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"--dtype {args.dtype}: torch has no such type")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    most = args.frame_tokens
    if args.model == BADGE:
        if most is not None:
            raise ConfigError("--frame-tokens is for Qwen's models; badge makes 4 of each frame")
        from offload.video.badge_adapter import badge_adapter

        return badge_adapter(dtype, torch.device(device))
    from offload.video.adapters import load_adapter
    from offload.video.qwen_vl import MIN_TOKENS

    options = {} if most is None else {"max_tokens": most, "min_tokens": min(MIN_TOKENS, most)}
    return load_adapter(Path(args.model), dtype, torch.device(device), **options)


def stream_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a ``VideoStream``."""
    tiers = ["gpu", "cpu", "disk"] if args.capacity is None else list(args.capacity)
    return {"tiers": tiers, "capacity": args.capacity, "disk_path": args.disk_path}


def open_frames(args: argparse.Namespace) -> Source:
    """Open the source."""
    return open_source(
        args.source,
        fps=args.fps,
        realtime=args.realtime,
        policy=args.policy,
        queue_frames=args.queue,
        reconnect=args.reconnect,
    )


def plan_of(args: argparse.Namespace, adapter: VideoAdapter) -> RetrievalPlan:
    """Return how frames are chosen.

    Raises
    ------
    ConfigError
        The numbers are impossible, or the scores cannot be read.
    """
    recent = args.recent if args.recent is not None else min(1, args.units) * (args.mode != "rekv")
    if args.frames is None:
        return RetrievalPlan(args.mode, args.units, recent, args.consensus)
    choose = read_unit_scores(args.frames, adapter.frames_per_unit)
    return RetrievalPlan("external", args.units, recent, choose=choose)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let the body end, quietly, by Ctrl-C and by SIGTERM. On the main thread."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _capacity(text: str) -> dict[str, str]:
    parts = [part.partition("=") for part in text.split(",")]
    if not all(tier and size for tier, _, size in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form gpu=1GiB,disk=20GiB")
    return {tier: size for tier, _, size in parts}
