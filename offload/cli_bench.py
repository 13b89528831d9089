"""``offload bench``: speed of this machine with each cache, faulty disks, and many machines."""

import argparse
from typing import Final

from offload.bench import cli_simulate, cli_soak, cli_speed

_KINDS: Final = {
    "attention": cli_speed,
    "decode": cli_speed,
    "suite": cli_speed,
    "soak": cli_soak,
    "simulate": cli_simulate,
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "bench", help="measure speed, try out a faulty disk, or simulate many machines"
    )
    kinds = parser.add_subparsers(dest="bench", metavar="bench", required=True)
    for module in (cli_speed, cli_soak, cli_simulate):
        module.add_parsers(kinds)


def run(args: argparse.Namespace) -> int:
    """Run one kind; see there for what it returns and raises."""
    return int(_KINDS[args.bench].run(args))
