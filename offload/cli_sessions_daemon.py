"""``offload sessions --url``: the same, of a running daemon; and what only a daemon can do."""

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from offload.cli_client import (
    DaemonClient,
    add_client_options,
    client_of,
    printable,
    session_path,
)
from offload.cli_ps import format_age, tier_strip
from offload.cli_store import add_json_option, print_result
from offload.config import format_size
from offload.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

ONLY_DAEMON: Final = frozenset({"fork", "persist", "evict", "prefetch", "explain"})
"""Actions on sessions that are in memory; the others work on a root, too."""

_Act = Callable[[DaemonClient, argparse.Namespace], None]


def add_daemon_actions(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Register what only a daemon can do."""

    def add(name: str, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=f"{text} (of a daemon)")
        action.add_argument("name", metavar="NAME")
        add_client_options(action)
        add_json_option(action)
        return action

    fork = add("fork", "make a copy that shares its chunks")
    fork.add_argument("new_name", metavar="NEW-NAME")
    fork.add_argument("--at", type=int, metavar="TOKEN", help="only so many tokens (default: all)")
    add("persist", "save what a session has gained")
    add("prefetch", "bring a session up from the disk")
    evict = add("evict", "move an idle session out of the way")
    evict.add_argument("--to", choices=("host", "disk"), default="disk")
    explain = add("explain", "say where a prompt leaves what a session has")
    explain.add_argument("prompt", metavar="PROMPT")


def run_on_daemon(args: argparse.Namespace) -> int:
    """Have a daemon do what was asked, and print what came of it.

    Raises
    ------
    ConfigError
        No daemon answers, it refuses, or it cannot do that.
    """
    act = _ACTS.get(args.action)
    if act is None:
        raise ConfigError(
            f"{args.action!r} works on a root, not on a daemon; a daemon knows: {', '.join(_ACTS)}"
        )
    act(client_of(args), args)
    return 0


def _list(client: DaemonClient, args: argparse.Namespace) -> None:
    sessions = client.ask("GET", "/v1/sessions")["data"]
    shown = _table(sessions) if sessions else f"no sessions at {client.url}"
    print_result(args.json, {"sessions": sessions}, shown)


def _info(client: DaemonClient, args: argparse.Namespace) -> None:
    _print(args, client.ask("GET", session_path(args.name)))


def _pin(client: DaemonClient, args: argparse.Namespace) -> None:
    body = {"pin": args.action == "pin"}
    _print(args, *[client.ask("PATCH", session_path(name), body) for name in args.names])


def _set_ttl(client: DaemonClient, args: argparse.Namespace) -> None:
    _print(args, client.ask("PATCH", session_path(args.name), {"ttl_s": args.ttl}))


def _delete(client: DaemonClient, args: argparse.Namespace) -> None:
    names = args.names or [each["id"] for each in client.ask("GET", "/v1/sessions")["data"]]
    if args.all and not args.yes:
        raise ConfigError(f"--all would delete all {len(names)} of {client.url}; add --yes")
    if bool(args.names) == args.all:
        raise ConfigError("name the sessions to delete, or say --all --yes; not both")
    for name in names:
        client.ask("DELETE", session_path(name))
    print_result(args.json, {"names": names}, f"deleted {', '.join(map(printable, names))}")


def _fork(client: DaemonClient, args: argparse.Namespace) -> None:
    body = {"name": args.new_name} | ({} if args.at is None else {"at_token": args.at})
    _print(args, client.ask("POST", session_path(args.name, "fork"), body))


def _evict(client: DaemonClient, args: argparse.Namespace) -> None:
    _print(args, client.ask("POST", session_path(args.name, "evict"), {"to": args.to}))


def _move(client: DaemonClient, args: argparse.Namespace) -> None:
    _print(args, client.ask("POST", session_path(args.name, args.action)))


def _explain(client: DaemonClient, args: argparse.Namespace) -> None:
    found = client.ask("POST", session_path(args.name, "explain"), {"prompt": args.prompt})
    split = found["split_at"]
    lines: list[RenderableType] = [
        f"{found['num_common_tokens']:,} of {found['num_prompt_tokens']:,} prompt tokens are those "
        f"of the session, which has {found['num_session_tokens']:,}: {found['reason']}",
        *(
            Text.assemble(f"{title}: ", printable(text[:split]), (printable(text[split:]), "red"))
            for title, text in (
                ("session", found["session_text"]),
                ("prompt ", found["prompt_text"]),
            )
        ),
    ]
    print_result(args.json, found, *lines)


def _export(client: DaemonClient, args: argparse.Namespace) -> None:
    if args.overwrite:
        args.file.unlink(missing_ok=True)
    elif args.file.exists():
        raise ConfigError(f"{args.file} exists; --overwrite replaces it")
    num_bytes = client.download(session_path(args.name, "export"), args.file)
    data = {"file": args.file, "archive_bytes": num_bytes}
    print_result(args.json, data, f"{args.file}: {format_size(num_bytes)}")


def _import(client: DaemonClient, args: argparse.Namespace) -> None:
    name = args.name or args.file.name.split(".")[0]
    path = f"/v1/sessions/import?name={quote(name, safe='')}"
    _print(args, client.upload(path, args.file))


_ACTS: Final[dict[str, _Act]] = {
    "list": _list,
    "info": _info,
    "pin": _pin,
    "unpin": _pin,
    "ttl": _set_ttl,
    "delete": _delete,
    "export": _export,
    "import": _import,
    "fork": _fork,
    "evict": _evict,
    "persist": _move,
    "prefetch": _move,
    "explain": _explain,
}


def _print(args: argparse.Namespace, *sessions: dict[str, Any]) -> None:
    print_result(args.json, {"sessions": sessions}, _table(sessions))


def _table(sessions: "list[dict[str, Any]] | tuple[dict[str, Any], ...]") -> Table:
    now = time.time()
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for title in ("name", "where", "by tier", "tokens", "size", "used", "flags"):
        table.add_column(title, justify="right" if title in ("tokens", "size", "used") else "left")
    for each in sessions:
        unsaved = f"{each['dirty_tokens']:,} unsaved" if each["dirty_tokens"] else ""
        table.add_row(
            Text(printable(each["id"]), overflow="fold"),
            each["state"],
            tier_strip(each),
            f"{each['num_tokens']:,}",
            format_size(each["size_bytes"]),
            f"{format_age(max(0.0, now - each['last_used_s']))} ago",
            " ".join(word for word in ("pinned" if each["is_pinned"] else "", unsaved) if word),
        )
    return table
