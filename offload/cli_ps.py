"""``offload ps``: what a running daemon holds and does."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from offload.cli_client import add_client_options, client_of, printable
from offload.config import format_size

_COLORS: Final = {
    "device": "magenta",
    "host": "cyan",
    "disk": "yellow",
    "remote": "blue",
    "running": "green",
}
_TIERS: Final = ("device", "host", "disk", "remote")
_STRIP_CELLS: Final = 16
_WIDTH_OF_A_PIPE: Final = 160
_SPANS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))

State = dict[str, Any]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("ps", help="show tiers, requests and sessions of a daemon")
    add_client_options(parser)
    parser.add_argument("--watch", action="store_true", help="go on until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print JSON; one line each to watch")


def run(args: argparse.Namespace) -> int:
    """Print the state, once or every second.

    Raises
    ------
    ConfigError
        No daemon answers, or it wants an administrator's key.
    """
    client = client_of(args)
    if not args.watch:
        state = client.ask("GET", "/admin/api/state")
        _print(state, as_json=args.json)
        return 0
    states = (data for _, data in client.events("/admin/api/events"))
    if args.json:
        for state in states:
            print(json.dumps(state), flush=True)
        return 0
    with Live(console=_console(), screen=sys.stdout.isatty(), auto_refresh=False) as live:
        for state in states:
            live.update(state_report(state), refresh=True)
    return 0


def state_report(state: State) -> Group:
    """Return the state as tables, for people."""
    parts: list[RenderableType] = [_headline(state), "", _tiers_table(state)]
    if state["requests"]:
        parts += ["", _requests_table(state)]
    parts += ["", _sessions_table(state) if state["sessions"] else Text("no sessions")]
    return Group(*parts)


def _print(state: State, *, as_json: bool) -> None:
    if as_json:
        json.dump(state, sys.stdout, indent=2)
        print()
    else:
        _console().print(state_report(state))


def _console() -> Console:
    width = None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE
    return Console(width=width, markup=False, highlight=False)


def _headline(state: State) -> Text:
    totals = state["totals"]
    known = sum(totals["cached"].values())
    word = "draining" if state["is_draining"] else "ready" if state["is_ready"] else "not ready"
    share = f"{known / totals['prompt_tokens']:.0%}" if totals["prompt_tokens"] else "none"
    return Text.assemble(
        (state["model"], "bold"),
        f"  {word}, up {format_age(state['now_s'] - state['started_s'])}; "
        f"{state['num_running']} running, {state['num_waiting']} waiting; "
        f"{share} of {totals['prompt_tokens']:,} prompt tokens known, "
        f"{totals['prefill_s_saved']:.1f} s of prefill saved; "
        f"{format_size(state['written_today_bytes'])} written today",
        "" if state["is_persisting"] else ("; not saving: the disk refuses", "bold red"),
    )


def _tiers_table(state: State) -> Table:
    table = _table("tier", "", ">used", ">capacity", ">peak", ">read", ">written")
    for tier in state["tiers"]:
        used, capacity = tier["used_bytes"], tier["capacity_bytes"]
        color = _COLORS[tier["name"]]
        table.add_row(
            Text(tier["name"], color),
            ProgressBar(max(1, capacity), used, width=24, complete_style=color),
            format_size(used),
            format_size(capacity),
            format_size(tier["peak_bytes"]),
            f"{format_size(round(tier['read_bytes_per_s']))}/s",
            f"{format_size(round(tier['written_bytes_per_s']))}/s",
        )
    return table


def _requests_table(state: State) -> Table:
    table = _table("request of", "phase", "prompt", ">known", ">tokens", ">written", ">for")
    for request in state["requests"]:
        total = request["num_prompt_tokens"]
        table.add_row(
            Text(printable(request["session"] or "–")),
            request["phase"],
            ProgressBar(max(1, total), request["num_done"], width=24),
            f"{request['num_cached']:,}",
            f"{total:,}",
            f"{request['num_generated']:,}",
            format_age(request["age_s"]),
        )
    return table


def _sessions_table(state: State) -> Table:
    table = _table(
        *("session", "where", "by tier", ">tokens", ">size", ">hit", ">idle", ">expires", "")
    )
    for session in state["sessions"]:
        expires = session["expires_s"]
        table.add_row(
            Text(printable(session["name"]), overflow="fold"),
            Text(session["state"], _COLORS[session["state"]]),
            tier_strip(session),
            f"{session['num_tokens']:,}",
            format_size(session["size_bytes"]),
            f"{session['last_hit_share']:.0%}" if session["num_requests"] else "–",
            format_age(max(0.0, state["now_s"] - session["last_used_s"])),
            "never" if expires is None else format_age(max(0.0, expires - state["now_s"])),
            Text(" ".join(_flags(session, state)), "dim"),
        )
    return table


def tier_strip(session: State) -> Text:
    """Return how many of a session's tokens are where, as a strip of blocks."""
    strip, num_cells = Text(), 0
    total = sum(session["tokens"].values())
    num_before = 0
    for tier in _TIERS:
        num_before += session["tokens"].get(tier, 0)
        end = round(_STRIP_CELLS * num_before / total) if total else 0
        strip.append("━" * (end - num_cells), _COLORS[tier])
        num_cells = end
    return strip.append("━" * (_STRIP_CELLS - num_cells), "bright_black")


def format_age(seconds: float) -> str:
    """Write a length of time for people: ``45 s``, ``12 min``, ``3 h``, ``2 d``."""
    # That of ``sessions_report`` comes with torch, which takes a second to import.
    size, unit = next((each for each in _SPANS if seconds >= each[0]), _SPANS[-1])
    return f"{seconds / size:.0f} {unit}"


def _flags(session: State, state: State) -> Iterator[str]:
    if session["is_pinned"]:
        yield "pinned"
    if session["dirty_tokens"]:
        yield f"{session['dirty_tokens']:,} unsaved"
    if session["parent"] is not None:
        yield f"from {session['parent']}"
    if len({each["tenant"] for each in state["sessions"]}) > 1:
        yield f"of {session['tenant']}"


def _table(*titles: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title.lstrip(">"), justify="right" if title.startswith(">") else "left")
    return table
