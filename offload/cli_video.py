"""``offload video``: encode a stream once, ask at any time, see the evidence."""

import argparse
from typing import Final

from offload.video import cli_ask, cli_encode, cli_eval, cli_run, cli_viz

_KINDS: Final = {
    "encode": cli_encode,
    "resume": cli_encode,
    "ask": cli_ask,
    "run": cli_run,
    "eval": cli_eval,
    "viz": cli_viz,
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("video", help="encode a video once and ask about it")
    kinds = parser.add_subparsers(dest="kind", metavar="kind", required=True)
    for name, kind in _KINDS.items():
        kind.add_parser(kinds, name)


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Returns
    -------
    int
        0

    Raises
    ------
    ConfigError
        The arguments are impossible.
    """
    _KINDS[args.kind].run(args)
    return 0
