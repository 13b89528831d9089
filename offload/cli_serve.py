"""``offload serve``: the daemon, in the foreground."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from offload.cli_daemon import OPTIONS, add_config_options, import_daemon, options_of
from offload.errors import ConfigError

_PACKAGED: Final = "recall"
_RAY_OPTIONS: Final = ("replicas", "cpus", "gpus")
_RAY_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Two requests that are alike are two lines of the log.
    "RAY_DEDUP_LOGS": "0",
    # Ray on a loaded machine gives up after 30 s.
    "RAY_raylet_start_wait_time_s": "240",
    # Who reaches the ports of Ray can run anything: without clusters they are on loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Of a Ray that is started here. Ray reads it when it is imported."""


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
    text = "replicas on Ray Serve, here or on the cluster of $RAY_ADDRESS (see docs/ray.md)"
    parser.add_argument("--ray", action="store_true", help=text)
    parser.add_argument("--replicas", type=int, metavar="N", help="with --ray (default: 1)")
    parser.add_argument("--cpus", type=float, metavar="C", help="of each replica (default: 1)")
    parser.add_argument("--gpus", type=float, metavar="G", help="of each replica (default: 0)")


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
    given = {name: getattr(args, name) for name in _RAY_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not args.ray:
        raise ConfigError(f"--{next(iter(given))} is of Ray Serve; add --ray")

    def announce(address: str) -> None:
        print(_hello(address, configuration.model.path), file=sys.stderr, flush=True)
        if args.ready_file is not None:
            import_daemon("serve").write_ready_file(args.ready_file, address)

    if args.ray:
        return _run_ray(args, given, announce)
    status: int = import_daemon("serve").run_daemon(configuration, read, announce)
    return status


def _run_ray(
    args: argparse.Namespace, given: dict[str, Any], announce: Callable[[str], None]
) -> int:
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.update(_RAY_ENVIRONMENT | dict(os.environ))
    file = args.config or os.environ.get("OFFLOAD_CONFIG") or None
    arguments = import_daemon("replica").ReplicaArguments(
        config=None if file is None else Path(file).absolute(), set=options_of(args), **given
    )
    status: int = import_daemon("ray_serve", "daemon,ray").run_ray(arguments, announce)
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
