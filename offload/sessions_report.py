"""Sessions and the space they take up: tables for people, plain data for programs."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from offload.config import format_size
from offload.report import pairs_table
from offload.sessions.ledger import Usage
from offload.sessions.listing import SessionInfo
from offload.sessions.session_file import SessionFile
from offload.types import ChunkLayout

_SPANS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def sessions_table(sessions: Iterable[SessionInfo], now: float) -> Table:
    """Return one row per session.

    Parameters
    ----------
    sessions : iterable of SessionInfo
    now : float
        Seconds since 1970.
    """
    # Nine columns and a name in eighty characters.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column("name", overflow="fold")
    for title in ("tokens", "rows", "size", "own"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in ("created", "used", "expires"):
        table.add_column(title, justify="right")
    table.add_column("flags")
    for info in sessions:
        table.add_row(
            info.name,
            f"{info.num_tokens:,}",
            str(info.num_rows),
            format_size(info.num_bytes),
            format_size(info.own_bytes),
            _ago(now - info.created_at),
            _ago(now - info.used_at),
            "never" if info.expires_at is None else _in(info.expires_at - now),
            flags(info),
        )
    return table


def flags(info: SessionInfo) -> Text:
    """Return the words for what is special about a session."""
    named = (
        ("damaged", info.is_damaged, "bold red"),
        ("pinned", info.is_pinned, "cyan"),
        ("open", info.is_open, "green"),
    )
    return Text(" ").join(Text(word, style) for word, is_so, style in named if is_so)


def session_report(info: SessionInfo, file: SessionFile, now: float) -> Group:
    """Return everything about one session, but its content.

    Parameters
    ----------
    info : SessionInfo
        What the catalog says.
    file : SessionFile
        What its own file says.
    now : float
        Seconds since 1970.
    """
    segments = Table("segment", show_edge=False, header_style="bold")
    for title in ("layers", "positions", "used here"):
        segments.add_column(title, justify="right")
    used = _used_positions(file)
    for name, (num_layers, num_positions) in file.segments.items():
        segments.add_row(name, str(num_layers), str(num_positions), str(used[name]))
    fields = pairs_table([(f"  {name}", text) for name, text in file.namespace.fields.items()])
    return Group(pairs_table(_rows(info, file, now)), "", "namespace", fields, "", segments)


def session_data(info: SessionInfo, file: SessionFile) -> dict[str, Any]:
    """Return everything about one session, but its content, for JSON."""
    layout, used = file.layout, _used_positions(file)
    return dataclasses.asdict(info) | {
        "identity": file.identity,
        "has_token_ids": file.token_ids is not None,
        "layers": list(file.layers),
        "layout": dataclasses.asdict(layout) | {"dtype": _dtype(layout)},
        "namespace": dict(file.namespace.fields),
        "namespace_digest": file.namespace.digest.hex(),
        "segments": {
            name: {"num_layers": layers, "num_positions": positions, "used_here": used[name]}
            for name, (layers, positions) in file.segments.items()
        },
    }


def usage_report(usage: Usage, root: Path) -> Table:
    """Return how much space there is below a root, and who has it."""
    share = usage.used_bytes / usage.quota_bytes if usage.quota_bytes else 1.0
    return pairs_table(
        [
            ("root", str(root)),
            ("quota", format_size(usage.quota_bytes)),
            ("used", f"{format_size(usage.used_bytes)}, {share:.0%} of the quota"),
            ("of it reserved", format_size(usage.reserved_bytes)),
            ("of it garbage", format_size(usage.garbage_bytes)),
            ("device, free", format_size(usage.free_bytes)),
            ("to stay free", format_size(usage.min_free_bytes)),
            ("sessions", str(usage.num_sessions)),
        ]
    )


def format_span(seconds: float) -> str:
    """Write a length of time for people, in its largest unit: ``3 h``, ``12 d``, ``45 s``."""
    # Clocks are set back, so a span may be negative.
    size, unit = next((each for each in _SPANS if seconds >= each[0]), _SPANS[-1])
    return f"{max(0.0, seconds) / size:.0f} {unit}"


def format_layers(layers: Sequence[int]) -> str:
    """Write layers in order, runs as one: ``0–31``, ``0–2, 5``."""
    starts = [i for i, pair in enumerate(pairwise(layers), 1) if pair[1] != pair[0] + 1]
    runs = [layers[start:stop] for start, stop in pairwise([0, *starts, len(layers)])]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(*run) for run in runs)


def _rows(info: SessionInfo, file: SessionFile, now: float) -> Iterator[tuple[str, str]]:
    layout = file.layout
    yield "name", info.name
    yield "identity", file.identity
    yield "flags", flags(info).plain or "none"
    yield "tokens", f"{info.num_tokens:,} in each row"
    yield "rows", str(info.num_rows)
    yield "token ids", "unknown" if file.token_ids is None else "kept"
    yield "chunks", f"{info.num_chunks:,} of {layout.chunk_tokens} tokens, all layers together"
    yield "size", f"{format_size(info.num_bytes)}, {format_size(info.own_bytes)} only for it"
    yield "created", _ago(now - info.created_at)
    yield "used", _ago(now - info.used_at)
    yield "expires", "never" if info.expires_at is None else _in(info.expires_at - now)
    yield "layers", format_layers(file.layers)
    heads = f"{layout.num_kv_heads} KV heads, {layout.key_dim} + {layout.value_dim} wide"
    yield "layout", f"{heads}, {_dtype(layout)}"


def _used_positions(file: SessionFile) -> Counter[str]:
    return Counter(ref.segment for ref in {ref for row in file.rows for ref in row})


def _dtype(layout: ChunkLayout) -> str:
    return str(layout.dtype).removeprefix("torch.")


def _ago(seconds: float) -> str:
    return f"{format_span(seconds)} ago"


def _in(seconds: float) -> str:
    return f"in {format_span(seconds)}"
