"""The ``offload`` command. Knows its subcommands by name only, and imports the one that runs."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

from offload.errors import OffloadError

_COMMANDS: Final = (
    *("doctor", "demo", "generate", "sessions", "fsck", "bench", "eval", "video"),
    *("serve", "ps", "chat", "config"),
)
"""Each is a module ``offload.cli_<name>`` with ``add_parser(subparsers)`` and ``run(args)``."""

_EXIT_REFUSED: Final = 2
_EXIT_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the program name; ``sys.argv`` by default.

    Returns
    -------
    int
        What the subcommand returned; 2 if it raised an OffloadError, whose message is then the
        one line on standard error; 130 after Ctrl-C.

    Raises
    ------
    SystemExit
        The arguments do not parse (2), or asked for help or the version (0).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(argv[:1]).parse_args(argv)
    try:
        return int(_module(args.command).run(args))
    except OffloadError as error:
        print(f"offload: {error}", file=sys.stderr)
        return _EXIT_REFUSED
    except KeyboardInterrupt:
        print("offload: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED


def build_parser(named: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser with the subcommands that are named, or else with all that are installed.

    Some take seconds to import, and the one that runs may not need them.
    """
    parser = argparse.ArgumentParser(
        prog="offload", description="KV caches on three tiers: device, host memory and disk."
    )
    version = importlib.metadata.version("kv-offload")
    parser.add_argument("--version", action="version", version=f"offload {version}")
    if list(named) == ["--version"]:
        return parser
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in [name for name in named if name in _COMMANDS] or _COMMANDS:
        if importlib.util.find_spec(_module_name(command)) is not None:
            _module(command).add_parser(subparsers)
    return parser


def _module_name(command: str) -> str:
    return f"offload.cli_{command}"


def _module(command: str) -> ModuleType:
    return importlib.import_module(_module_name(command))


if __name__ == "__main__":
    sys.exit(main())
