"""``offload sessions``: look at saved sessions; change, verify, move and delete them."""

import argparse
import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from offload.cli_client import add_client_options
from offload.cli_progress import count_progress
from offload.cli_sessions_daemon import ONLY_DAEMON, add_daemon_actions, run_on_daemon
from offload.cli_store import add_store_options, existing_root, key_of, print_result
from offload.config import format_size
from offload.errors import ConfigError, CorruptChunk
from offload.fsck_report import records_table, report_data, verdict
from offload.sessions.fsck import FsckReport
from offload.sessions.store import SessionStore
from offload.sessions_report import (
    format_span,
    session_data,
    session_report,
    sessions_table,
    usage_report,
)

_LIFETIME: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhdw])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}

_Action = Callable[[SessionStore, argparse.Namespace], int]
_AddArgument = Callable[..., object]
_AddAction = Callable[..., _AddArgument]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("sessions", help="look at saved sessions, and change them")
    actions = parser.add_subparsers(dest="action", metavar="action", required=True)

    def add(name: str, act: _Action, text: str, *, makes_root: bool = False) -> _AddArgument:
        action = actions.add_parser(name, help=text)
        action.set_defaults(act=act, makes_root=makes_root, quota=None, min_free=None)
        add_store_options(action)
        add_client_options(action)
        return action.add_argument

    add("list", _list, "show all sessions")
    add("info", _info, "show all about a session")("name", metavar="NAME")
    for name, act, text in (
        ("pin", _pin, "never evict sessions to make room"),
        ("unpin", _pin, "allow to evict sessions again"),
        ("verify", _verify, "read whole sessions and compare them with their checksums"),
    ):
        add(name, act, text)("names", metavar="NAME", nargs="+")
    _add_changes(add)
    _add_files(add)
    add("usage", _usage, "show how much space there is, and who has it")
    argument = add("limits", _usage, "set the quota of a root, new or not", makes_root=True)
    argument("--quota", metavar="SIZE", help="hard limit of all below the root, such as 200GiB")
    argument("--min-free", metavar="SIZE", help="what is to stay free on the device; may be 0")
    add_daemon_actions(actions)


def run(args: argparse.Namespace) -> int:
    """Do what was asked, and print what came of it: in a root, or by a daemon where one is named.

    Returns
    -------
    int
        1 if ``verify`` found damage, else 0.

    Raises
    ------
    OffloadError
        There is no such root or session, or the store refuses.
    """
    if args.url is not None or args.action in ONLY_DAEMON:
        return run_on_daemon(args)
    _refuse_impossible(args)
    root = args.root if args.makes_root else existing_root(args.root)
    limits = {"quota": args.quota, "min_free": args.min_free}
    with SessionStore(root, **limits, key=key_of(args, root)) as store:
        act: _Action = args.act
        return act(store, args)


def lifetime(text: str) -> float | None:
    """Read a length of time such as ``7d``, for ``type=`` of an argument; None is forever."""
    if text == "none":
        return None
    found = _LIFETIME.fullmatch(text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 90s, 30m, 12h, 7d, 2w or none")
    return float(found[1]) * _SECONDS[found[2]]


def _add_changes(add: _AddAction) -> None:
    argument = add("ttl", _set_ttl, "let a session expire, counted from now")
    argument("name", metavar="NAME")
    argument("ttl", metavar="TTL", type=lifetime, help="such as 90s, 30m, 12h, 7d, 2w, or none")
    argument = add("rename", _rename, "give a session another name")
    argument("name", metavar="NAME")
    argument("new_name", metavar="NEW-NAME")
    argument = add("delete", _delete, "delete sessions; chunks that others need stay")
    argument("names", metavar="NAME", nargs="*")
    argument("--force", action="store_true", help="also while a cache has them open")
    argument("--all", action="store_true", help="every session of the root; needs --yes")
    argument("--yes", action="store_true", help="say that --all is meant")


def _add_files(add: _AddAction) -> None:
    argument = add("export", _export, "write a session to a file that stands alone")
    argument("name", metavar="NAME")
    argument("file", metavar="FILE", type=Path, help="usually NAME.kv.tar.zst")
    argument("--overwrite", action="store_true", help="replace a file that is there")
    argument = add("import", _import, "read a session from such a file", makes_root=True)
    argument("file", metavar="FILE", type=Path)
    argument("--name", metavar="NAME", help="what to call it (default: as it was called)")
    argument("--overwrite", action="store_true", help="replace a session of that name")
    text = "let other sessions reuse its chunks for the same tokens; only if you trust who made it"
    argument("--trust-prefixes", action="store_true", help=text)


def _refuse_impossible(args: argparse.Namespace) -> None:
    """Find out before a root is opened, or made."""
    if args.action == "limits" and args.quota is None and args.min_free is None:
        raise ConfigError("nothing to set; give --quota, --min-free, or both")
    if args.action == "delete" and bool(args.names) == args.all:
        raise ConfigError("name the sessions to delete, or say --all --yes; not both")


def _list(store: SessionStore, args: argparse.Namespace) -> int:
    sessions = store.list()
    data = {"root": store.path, "sessions": [dataclasses.asdict(info) for info in sessions]}
    table = sessions_table(sessions, time.time())
    print_result(args.json, data, table if sessions else f"no sessions in {store.path}")
    return 0


def _info(store: SessionStore, args: argparse.Namespace) -> int:
    info, file = store.info(args.name), store.describe(args.name)
    print_result(args.json, session_data(info, file), session_report(info, file, time.time()))
    return 0


def _pin(store: SessionStore, args: argparse.Namespace) -> int:
    is_pinned = args.action == "pin"
    _check_names(store, args.names)
    for name in args.names:
        store.pin(name, is_pinned)
    said = f"{args.action}ned {', '.join(args.names)}"
    print_result(args.json, {"names": args.names, "is_pinned": is_pinned}, said)
    return 0


def _set_ttl(store: SessionStore, args: argparse.Namespace) -> int:
    store.set_ttl(args.name, args.ttl)
    when = "never expires" if args.ttl is None else f"expires in {format_span(args.ttl)}"
    data = {"name": args.name, "expires_at": store.info(args.name).expires_at}
    print_result(args.json, data, f"{args.name} {when}")
    return 0


def _rename(store: SessionStore, args: argparse.Namespace) -> int:
    store.rename(args.name, args.new_name)
    data = {"name": args.new_name, "old_name": args.name}
    print_result(args.json, data, f"{args.name} is now called {args.new_name}")
    return 0


def _delete(store: SessionStore, args: argparse.Namespace) -> int:
    names = args.names or [info.name for info in store.list()]
    if args.all and not args.yes:
        raise ConfigError(f"--all would delete all {len(names)} of {store.path}; add --yes")
    _check_names(store, names)
    before = store.usage().used_bytes
    for name in names:
        store.delete(name, force=args.force)
    freed = max(0, before - store.usage().used_bytes)
    said = f"deleted {', '.join(names)}: {format_size(freed)} freed" if names else "no sessions"
    print_result(args.json, {"names": names, "freed_bytes": freed}, said)
    return 0


def _verify(store: SessionStore, args: argparse.Namespace) -> int:
    _check_names(store, args.names)
    reports = {name: _verify_one(store, name) for name in args.names}
    bad = [record for report in reports.values() for record in report.bad_records]
    is_clean = all(report.is_clean for report in reports.values())
    sessions = {name: report_data(report) for name, report in reports.items()}
    said = [f"{name}: {verdict(report)}" for name, report in reports.items()]
    table = [records_table(bad)] if bad else []
    print_result(args.json, {"is_clean": is_clean, "sessions": sessions}, *said, *table)
    return 0 if is_clean else 1


def _verify_one(store: SessionStore, name: str) -> FsckReport:
    with count_progress(f"verifying {name}", "chunks") as progress:
        try:
            return store.verify(name, progress)
        except CorruptChunk as error:
            return FsckReport(num_sessions=1, bad_sessions={name: str(error)})


def _export(store: SessionStore, args: argparse.Namespace) -> int:
    with count_progress(f"exporting {args.name}", "chunks") as progress:
        report = store.export(args.name, args.file, progress, overwrite=args.overwrite)
    said = (
        f"{report.path}: {report.num_chunks} chunks, {format_size(report.content_bytes)} in "
        f"{format_size(report.archive_bytes)}, {report.seconds:.1f} s"
    )
    print_result(args.json, dataclasses.asdict(report), said)
    return 0


def _import(store: SessionStore, args: argparse.Namespace) -> int:
    # Each chunk is verified, and then written.
    with count_progress(f"importing {args.file}", "steps") as progress:
        report = store.import_(
            args.file,
            args.name,
            progress,
            overwrite=args.overwrite,
            trust_prefixes=args.trust_prefixes,
        )
    said = (
        f"{report.name}: {report.num_tokens:,} tokens, {report.num_chunks} chunks, "
        f"{format_size(report.written_bytes)} written, {report.seconds:.1f} s"
    )
    print_result(args.json, dataclasses.asdict(report), said)
    return 0


def _usage(store: SessionStore, args: argparse.Namespace) -> int:
    usage = store.usage()
    data = {"root": store.path} | dataclasses.asdict(usage)
    print_result(args.json, data, usage_report(usage, store.path))
    return 0


def _check_names(store: SessionStore, names: list[str]) -> None:
    """Find out that one is missing before anything is done to the others."""
    for name in names:
        store.info(name)
