"""``offload fsck``: verify a session store, say what was found, and repair it if asked to."""

import argparse
import dataclasses
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from offload.cli_progress import count_progress
from offload.cli_store import add_json_option, existing_root, print_result
from offload.errors import CorruptCatalog
from offload.fsck_report import Finding, RootCheck, check_data, check_report
from offload.sessions.affected import affected_sessions, damaged_sessions
from offload.sessions.fsck import FsckReport, fsck
from offload.sessions.rebuild import rebuild
from offload.sessions.root import Root

_DESCRIPTION = """Reads every chunk of every session and compares it with its checksums, while
others go on using the store. Exits with 0 if nothing is wrong, with 1 if something was, repaired or
not. Chunks that were quarantined before are listed as such, and are nothing new."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "fsck", help="verify a session store, and repair it", description=_DESCRIPTION
    )
    text = "the session store (default: 'sessions' in the user's cache folder)"
    parser.add_argument("root", nargs="?", type=Path, metavar="ROOT", help=text)
    text = "first make a new catalog from the files; nobody may have the store open"
    parser.add_argument("--rebuild", action="store_true", help=text)
    text = (
        "quarantine damaged records and session files, restore damaged rows of the catalog, remove "
        "files that nobody knows"
    )
    parser.add_argument("--repair", action="store_true", help=text)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Check a root and print what was found.

    Returns
    -------
    int
        0 if nothing is wrong; 1 if something was, also where it has been repaired.

    Raises
    ------
    ConfigError
        There is no such root.
    SessionInUse
        Somebody has it open, and a rebuild was asked for.
    StorageError, TransferTimeout
        It cannot be told: the device does not answer.
    """
    root, rebuilt = existing_root(args.root), None
    if args.rebuild:
        with count_progress("reading session files", "files") as progress:
            rebuilt = rebuild(root, progress=progress)
    with count_progress("verifying", "chunks") as progress:
        check = check_root(root, repair=args.repair, progress=progress)
    check = dataclasses.replace(check, rebuilt=rebuilt)
    names = check.report.restored
    said = [f"sessions restored from their files: {', '.join(names)}"] if names else []
    print_result(args.json, check_data(check), check_report(check), *said)
    return 0 if check.is_clean else 1


def check_root(path: Path, *, repair: bool, progress: Callable[[int, int], object]) -> RootCheck:
    """Verify everything in a root; unlike ``SessionStore``, never replace its catalog.

    Parameters
    ----------
    path : Path
    repair : bool
        Set aside what is bad.
    progress : callable
        Told chunks checked, and chunks in all.
    """
    try:
        with closing(Root(path)) as root:
            root.ledger.configure(None, None)  # a new catalog may not know its quota yet
            report = fsck(root, repair=repair, progress=progress)
            findings = [
                Finding(record, affected_sessions(root.catalog, record), record.was_known)
                for record in report.bad_records
            ]
            return RootCheck(path, report, findings, damaged_sessions(root.catalog))
    except CorruptCatalog as error:
        return RootCheck(path, FsckReport(catalog_errors=[str(error)]))
