"""What the commands around the daemon share: its configuration, and the packages it needs."""

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from offload.errors import ConfigError

OPTIONS: Final = (
    ("--model", "model.path", "PATH", "folder of a causal model (default: the packaged one)"),
    ("--host", "server.host", "HOST", "address to listen on (default: 127.0.0.1)"),
    ("--port", "server.port", "PORT", "0: any that is free (default: 8000)"),
    ("--uds", "server.uds", "PATH", "listen on a Unix socket instead"),
    ("--data-path", "data_path", "DIR", "where sessions are kept"),
    ("--keys", "server.api_keys_file", "FILE", "who may use it: name:sha256 a line"),
)
"""Of ``offload serve``: the option, the key that it sets, and how it is shown."""

_EXTRA: Final = "the daemon needs more packages: pip install 'kv-offload[{extra}]' ({missing})"


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add where the configuration comes from."""
    text = "YAML or TOML (default: $OFFLOAD_CONFIG, or none)"
    parser.add_argument("--config", type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key, such as sessions.ttl=7d; may be given several times",
    )


def import_daemon(name: str, extra: str = "daemon") -> ModuleType:
    """Return a module of ``offload.daemon``, which need not be installed in full.

    Parameters
    ----------
    name : str
    extra : str
        What brings the packages that it needs.

    Raises
    ------
    ConfigError
        The extra's packages are missing; says how to get them.
    """
    try:
        return importlib.import_module(f"offload.daemon.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("offload"):
            raise
        raise ConfigError(_EXTRA.format(extra=extra, missing=error.name)) from error


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line says, by dotted key.

    Raises
    ------
    ConfigError
        A ``--set`` is not ``KEY=VALUE``.
    """
    options: dict[str, Any] = {}
    for text in args.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} is not KEY=VALUE")
        options[key] = value
    named = {key: getattr(args, key, None) for _, key, _, _ in OPTIONS}
    return options | {key: value for key, value in named.items() if value is not None}
