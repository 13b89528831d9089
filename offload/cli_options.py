"""Argument types and options that several subcommands share."""

import argparse
import math
from pathlib import Path

import torch


def positive_int(text: str) -> int:
    """Read a positive integer, for ``type=`` of an argument."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def temperature(text: str) -> float:
    """Read a sampling temperature, zero or more, for ``type=`` of an argument."""
    value = _float(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature: 0 or more")
    return value


def probability(text: str) -> float:
    """Read a probability above zero, for ``type=`` of an argument."""
    value = _float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability: above 0, at most 1")
    return value


def budget(text: str) -> float | int:
    """Read a number of tokens, or a share of the context with a decimal point, for ``type=``."""
    return int(text) if text.isdecimal() else _float(text)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command that runs a model takes: disk, chunks, threads, seed, JSON."""
    parser.add_argument(
        "--disk-path",
        type=Path,
        metavar="DIR",
        help="where the disk tier keeps its files (default: the user's cache folder)",
    )
    parser.add_argument(
        "--chunk-tokens",
        type=positive_int,
        default=64,
        metavar="N",
        help="tokens that move between tiers together (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="threads of torch (default: its own)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")


def apply_threads(args: argparse.Namespace) -> None:
    """Set the number of torch's threads, where the user gave one."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
