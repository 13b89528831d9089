"""``offload fsck``: verify a session store, say what was found, and repair it if asked to."""

import argparse
import dataclasses
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from offload.cli_progress import count_progress
from offload.cli_store import add_json_option, add_key_option, existing_root, key_of, print_result
from offload.config import format_size
from offload.errors import ConfigError, CorruptCatalog
from offload.fsck_report import Finding, RootCheck, check_data, check_report
from offload.sessions.affected import affected_sessions, damaged_sessions
from offload.sessions.fsck import FsckReport, fsck
from offload.sessions.key_file import KEY_FILE
from offload.sessions.rebuild import rebuild
from offload.sessions.root import Root
from offload.sessions.structure import check_files

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
    add_key_option(parser)
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
    key = key_of(args, root)
    if key is None and (root / KEY_FILE).exists():
        return _check_structure(root, args)
    if args.rebuild:
        with count_progress("reading session files", "files") as progress:
            rebuilt = rebuild(root, key=key, progress=progress)
    with count_progress("verifying", "chunks") as progress:
        check = check_root(root, key, repair=args.repair, progress=progress)
    check = dataclasses.replace(check, rebuilt=rebuilt)
    names = check.report.restored
    said = [f"sessions restored from their files: {', '.join(names)}"] if names else []
    print_result(args.json, check_data(check), check_report(check), *said)
    return 0 if check.is_clean else 1


def _check_structure(root: Path, args: argparse.Namespace) -> int:
    """Do what can be done without the key."""
    if args.repair or args.rebuild:
        raise ConfigError(f"{root} is encrypted: --repair and --rebuild take its --key-file")
    with count_progress("verifying", "files") as progress:
        report = check_files(root, progress)
    said = (
        f"{root} is encrypted. Without its key only checksums were compared: of "
        f"{report.num_sessions} session files and {report.num_records} records, "
        f"{format_size(report.num_bytes)}; {len(report.bad)} are wrong"
    )
    data = {"root": str(root), "is_clean": not report.bad, **dataclasses.asdict(report)}
    print_result(args.json, data, said, *(f"{name}: {why}" for name, why in report.bad.items()))
    return 1 if report.bad else 0


def check_root(
    path: Path, key: bytes | None, *, repair: bool, progress: Callable[[int, int], object]
) -> RootCheck:
    """Verify everything in a root; unlike ``SessionStore``, never replace its catalog.

    Parameters
    ----------
    path : Path
    key : bytes or None
        Of a root that is encrypted.
    repair : bool
        Set aside what is bad.
    progress : callable
        Told chunks checked, and chunks in all.
    """
    try:
        with closing(Root(path, key=key)) as root:
            root.ledger.configure(None, None)  # a new catalog may not know its quota yet
            report = fsck(root, repair=repair, progress=progress)
            findings = [
                Finding(record, affected_sessions(root.catalog, record), record.was_known)
                for record in report.bad_records
            ]
            return RootCheck(path, report, findings, damaged_sessions(root.catalog))
    except CorruptCatalog as error:
        return RootCheck(path, FsckReport(catalog_errors=[str(error)]))
