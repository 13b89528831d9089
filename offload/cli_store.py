"""What all subcommands that work on a session store share: which root, and how results look."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from rich.console import Console, RenderableType

from offload.errors import ConfigError
from offload.key_files import TENANTS, read_key_file, tenant_key
from offload.sessions.key_file import KEY_FILE, open_key
from offload.sessions.paths import RootPaths, default_root

_WIDTH_OF_A_PIPE: Final = 500
"""Columns; in a pipe nobody sees a line wrap, but ``grep`` misses what was cut."""


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """Add which root, and JSON."""
    text = "the session store (default: 'sessions' in the user's cache folder)"
    parser.add_argument("--root", type=Path, metavar="DIR", help=text)
    add_key_option(parser)
    add_json_option(parser)


def add_key_option(parser: argparse.ArgumentParser) -> None:
    """Add the key of an encrypted store."""
    text = "the key of a store that is encrypted"
    parser.add_argument("--key-file", type=Path, metavar="FILE", help=text)


def key_of(args: argparse.Namespace, root: Path | None) -> bytes | None:
    """Return the key of a root, given the key file that was named; None if there was none.

    Of a tenant of the daemon, whose root has a key of its own, it takes the daemon's.

    Raises
    ------
    ConfigError
        The file holds no key, others may read it, or it is not that of the daemon's data.
    """
    key = None if args.key_file is None else read_key_file(args.key_file)
    if key is None or root is None or len(root.parents) < 3:
        return key
    tenant, tenants, data_path = root.parents[:3]
    if tenants.name != TENANTS or not (data_path / KEY_FILE).exists():
        return key
    sealer = open_key(data_path, key, lambda: False)
    return key if sealer is None else tenant_key(sealer, tenant)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add JSON."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, in bytes")


def existing_root(path: Path | None) -> Path:
    """Return the root folder to work on, and make nothing.

    Parameters
    ----------
    path : Path or None
        None: where sessions are kept unless told otherwise.

    Raises
    ------
    ConfigError
        No store was ever opened there.
    """
    path = default_root() if path is None else path.expanduser()
    paths = RootPaths(path.absolute())
    try:
        # Either may have been lost, and fsck is there to say so.
        if paths.catalog.exists() or paths.quarantine.exists():
            return paths.root
        found = "is none" if paths.root.exists() else "does not exist"
    except OSError as error:
        raise ConfigError(f"cannot use {paths.root}: {error.strerror}") from error
    raise ConfigError(f"{paths.root} {found}; name the root of a session store")


def print_result(as_json: bool, data: Any, *shown: RenderableType) -> None:
    """Print data for programs, or tables and lines for people."""
    if as_json:
        json.dump(data, sys.stdout, indent=2, default=str)
        print()
        return
    width = None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE
    # Names, paths and reasons are not ours, and may look like markup.
    Console(width=width, markup=False, highlight=False).print(*shown, sep="\n")
