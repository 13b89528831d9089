"""``offload bench``: how fast this machine is with each cache, and what a faulty disk does."""

import argparse
from typing import Final

from offload.bench import cli_soak, cli_speed

_KINDS: Final = {
    "attention": cli_speed,
    "decode": cli_speed,
    "suite": cli_speed,
    "soak": cli_soak,
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("bench", help="measure speed, or try out a faulty disk")
    kinds = parser.add_subparsers(dest="bench", metavar="bench", required=True)
    for module in (cli_speed, cli_soak):
        module.add_parsers(kinds)


def run(args: argparse.Namespace) -> int:
    """Run one kind; see there for what it returns and raises."""
    return int(_KINDS[args.bench].run(args))
