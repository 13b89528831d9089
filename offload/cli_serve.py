"""``offload serve``: the daemon, in the foreground."""

import argparse
import functools
import sys
from pathlib import Path
from typing import Final

from offload.cli_daemon import OPTIONS, add_config_options, import_daemon, options_of

_PACKAGED: Final = "recall"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "serve", help="serve a model whose sessions live for days, behind HTTP"
    )
    add_config_options(parser)
    for name, key, metavar, text in OPTIONS:
        parser.add_argument(name, dest=key, metavar=metavar, help=text)
    text = "write the address there, as JSON, once connections are taken"
    parser.add_argument("--ready-file", type=Path, metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal says to stop.

    Raises
    ------
    ConfigError
        The configuration is wrong, or packages are missing.
    """
    load = import_daemon("ops.config_sources").load_configuration
    read = functools.partial(load, args.config, options_of(args))
    configuration = read()  # a mistake is told before anything heavy is imported
    daemon = import_daemon("serve")

    def announce(address: str) -> None:
        print(_hello(address, configuration.model.path), file=sys.stderr, flush=True)
        if args.ready_file is not None:
            daemon.write_ready_file(args.ready_file, address)

    status: int = daemon.run_daemon(configuration, read, announce)
    return status


def _hello(address: str, model: str) -> str:
    """Return what to try; the packaged model finds such records and can do nothing else."""
    is_path = address.startswith("unix:")
    url = "http://localhost" if is_path else address
    how = f"--unix-socket {address.removeprefix('unix:')} " if is_path else ""
    path = "/v1/chat/completions"
    body = '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}'
    if model == _PACKAGED:
        path = "/v1/completions"
        prompt = r'"prompt": "A note [gate:48213] and more text.\n[gate:"'
        body = f'{{{prompt}, "max_tokens": 6, "temperature": 0}}'
    return (
        f"\noffload serves {address}\n\n"
        f"  curl {how}{url}{path} -H 'Content-Type: application/json' \\\n"
        f"    -d '{body}'\n"
    )
