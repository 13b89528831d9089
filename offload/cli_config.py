"""``offload config``: check and show the daemon's configuration; make keys."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.cli_daemon import add_config_options, import_daemon, options_of
from offload.errors import ConfigError
from offload.key_files import make_key_file, read_key_file
from offload.sessions.key_file import rotate_key

if TYPE_CHECKING:
    from collections.abc import Callable


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("config", help="check and show the daemon's configuration")
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)

    def add(name: str, act: "Callable[[argparse.Namespace], int]", text: str) -> Any:
        action = actions.add_parser(name, help=text)
        action.set_defaults(act=act)
        return action

    check = add("check", _check, "say whether a configuration is good, and its keys too")
    check.add_argument("file", type=Path, nargs="?", metavar="FILE")
    show = add("show", _show, "print what would be used, from all sources")
    show.add_argument("--no-redact", action="store_true", help="print secrets too")
    for action in (check, show):
        add_config_options(action)
        action.add_argument("--json", action="store_true", help="print one JSON object")
    add("schema", _schema, "print the JSON schema, for editors")
    init = add("init", _init, "print a file with every key and its default, to begin with")
    init.add_argument("file", type=Path, nargs="?", metavar="FILE", help="write it there instead")
    init.add_argument("--table", action="store_true", help="as a Markdown table")
    key = add("key", _key, "make a key; prints it once, and its line for the file of keys")
    key.add_argument("name", metavar="NAME", help="tenant, or tenant/which")
    key.add_argument("--admin", action="store_true", help="may see the status page, of all tenants")
    key.add_argument("--file", type=Path, metavar="FILE", help="append the line to it")
    secret = add("encryption-key", _encryption_key, "make a key that encrypts, in a new file")
    secret.add_argument("file", type=Path, metavar="FILE")
    text = "change the key of an encrypted store, or of the daemon's data"
    rotate = add("rotate-encryption-key", _rotate, text)
    rotate.add_argument("folder", type=Path, metavar="DIR", help="the root, or the data path")
    rotate.add_argument("--key-file", type=Path, metavar="FILE", required=True, help="the old key")
    rotate.add_argument("--new-key-file", type=Path, metavar="FILE", required=True)


def run(args: argparse.Namespace) -> int:
    """Do what was asked.

    Raises
    ------
    ConfigError
        The configuration is wrong; says which key, and who said it.
    """
    act: Callable[[argparse.Namespace], int] = args.act
    return act(args)


def _load(args: argparse.Namespace) -> Any:
    """Return the ``Configuration``; a module that needs no extra cannot name the class."""
    return import_daemon("ops.config_sources").load_configuration(args.config, options_of(args))


def _check(args: argparse.Namespace) -> int:
    args.config = args.file or args.config
    configuration = _load(args)
    keys = import_daemon("ops.access").configured_keys(configuration.server)
    where = "defaults" if args.config is None else str(args.config)
    if args.json:
        print(json.dumps({"is_good": True, "file": where, "num_keys": len(keys)}))
    else:
        print(f"{where}: good; {len(keys)} keys")
    return 0


def _show(args: argparse.Namespace) -> int:
    text = import_daemon("ops.config_text")
    values = text.as_values(_load(args), redact=not args.no_redact)
    sys.stdout.write(json.dumps(values, indent=2) + "\n" if args.json else text.as_yaml(values))
    return 0


def _schema(_args: argparse.Namespace) -> int:
    print(json.dumps(import_daemon("ops.config_text").schema(), indent=2))
    return 0


def _init(args: argparse.Namespace) -> int:
    text = import_daemon("ops.config_text")
    content = text.table() if args.table else text.template()
    if args.file is None:
        sys.stdout.write(content)
        return 0
    try:
        with args.file.open("x") as file:
            file.write(content)
    except OSError as error:
        raise ConfigError(f"cannot make {args.file}: {error.strerror}") from error
    print(f"{args.file}: every key, with its default; check it with `offload config check`")
    return 0


def _key(args: argparse.Namespace) -> int:
    tenants = import_daemon("ops.tenants")
    key = tenants.new_key()
    line = tenants.key_line(args.name, key, is_admin=args.admin)
    if args.file is not None:
        tenants.append_key(args.file, line)
        print(f"added to {args.file}; the key is shown only now:", file=sys.stderr)
    else:
        print(f"line for the file of keys:\n{line}\nthe key, shown only now:", file=sys.stderr)
    print(key)
    return 0


def _encryption_key(args: argparse.Namespace) -> int:
    make_key_file(args.file)
    print(f"{args.file}: a new key; without it, what is encrypted with it is lost")
    return 0


def _rotate(args: argparse.Namespace) -> int:
    rotate_key(args.folder, read_key_file(args.key_file), read_key_file(args.new_key_file))
    print(f"{args.folder} opens with {args.new_key_file} from now on, and with nothing else")
    return 0
