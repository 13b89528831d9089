"""``offload eval``: how close sparse attention comes to full attention, and what it answers."""

import argparse
from typing import Final

from offload.cli_options import apply_threads
from offload.evals import cli_fidelity, cli_tasks
from offload.evals.outputs import check_outputs

_KINDS: Final = {"fidelity": cli_fidelity, "tasks": cli_tasks}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("eval", help="measure how good sparse attention is")
    kinds = parser.add_subparsers(dest="kind", metavar="kind", required=True)
    for kind in _KINDS.values():
        kind.add_parser(kinds)


def run(args: argparse.Namespace) -> int:
    """Measure, print tables, and write what was asked for.

    Returns
    -------
    int
        0: bad numbers are a result, not a failure.

    Raises
    ------
    ConfigError
        The arguments are impossible, or a file cannot be read or written.
    """
    apply_threads(args)
    check_outputs(args)
    _KINDS[args.kind].run(args)
    return 0
