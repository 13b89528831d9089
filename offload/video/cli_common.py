"""What the commands on videos share: model, tiers, source, retrieval."""

import argparse
from pathlib import Path
from typing import Any

import torch

from offload.cli_options import positive_int
from offload.errors import ConfigError
from offload.sessions.store import SessionStore
from offload.video.adapter import VideoAdapter
from offload.video.retrieval import RetrievalPlan
from offload.video.source import Source
from offload.video.sources import open_source

BADGE = "badge"
MODES = ("tokmax", "rekv", "recent", "uniform")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add which model, where its states go, and where streams are kept."""
    text = "a local folder, or badge (default): a small model for badges of BadgeWorld"
    parser.add_argument("--model", default=BADGE, metavar="PATH", help=text)
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="of the model")
    parser.add_argument("--device", metavar="DEVICE", help="of the model (default: CUDA, or CPU)")
    text = "the session store of streams (default: 'sessions' in the user's cache folder)"
    parser.add_argument("--root", type=Path, metavar="DIR", help=text)
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


def add_retrieval_options(parser: argparse.ArgumentParser) -> None:
    """Add how frames are chosen."""
    parser.add_argument("--mode", choices=MODES, default="tokmax", help="default: %(default)s")
    text = "frames that a question reads (default: %(default)s)"
    parser.add_argument("--units", type=positive_int, default=8, metavar="N", help=text)
    text = "of them the last ones, always (default: 1; none for rekv)"
    parser.add_argument("--recent", type=int, metavar="N", help=text)
    text = "all layers read the same frames"
    parser.add_argument("--consensus", action="store_true", help=text)
    parser.add_argument("--max-tokens", type=positive_int, default=32, metavar="N")


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
    if args.model == BADGE:
        from offload.video.badge_adapter import badge_adapter

        return badge_adapter(dtype, torch.device(device))
    from offload.video.adapters import load_adapter

    return load_adapter(Path(args.model), dtype, torch.device(device))


def stream_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a ``VideoStream``."""
    tiers = ["gpu", "cpu", "disk"] if args.capacity is None else list(args.capacity)
    return {"tiers": tiers, "capacity": args.capacity, "disk_path": args.disk_path}


def open_frames(args: argparse.Namespace) -> Source:
    """Open the source."""
    return open_source(args.source, fps=args.fps, realtime=args.realtime, policy=args.policy)


def open_root(args: argparse.Namespace) -> SessionStore:
    """Open the store of streams."""
    return SessionStore(args.root)


def plan_of(args: argparse.Namespace) -> RetrievalPlan:
    """Return how frames are chosen."""
    recent = args.recent if args.recent is not None else min(1, args.units) * (args.mode != "rekv")
    return RetrievalPlan(args.mode, args.units, recent, args.consensus)


def _capacity(text: str) -> dict[str, str]:
    parts = [part.partition("=") for part in text.split(",")]
    if not all(tier and size for tier, _, size in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form gpu=1GiB,disk=20GiB")
    return {tier: size for tier, _, size in parts}
