"""Traces of requests in Mooncake's format: one JSON object a line, block hashes instead of text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from offload.errors import ConfigError

MOONCAKE_BLOCK_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One prompt and the length of its answer.

    Attributes
    ----------
    arrival_s : float
        Since the start of the trace.
    input_tokens, output_tokens : int
    block_ids : tuple of int
        What the blocks of the prompt are called, the last of which may be partly filled. Equal
        names are equal tokens with equal tokens before them.
    session : int
        Turns of one conversation have the same number.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]
    session: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival, and how many tokens a block has."""

    requests: tuple[TraceRequest, ...]
    block_tokens: int = MOONCAKE_BLOCK_TOKENS

    def kept_ids(self) -> list[tuple[int, ...]]:
        """Return the full blocks that each request leaves behind, its answer included.

        What the blocks of an answer are called is known from the session's next prompt, if that
        goes on from it. The others of an answer are never asked for, and have no names.
        """
        following: dict[int, TraceRequest] = {}
        kept = []
        for request in reversed(self.requests):
            whole = request.block_ids[: request.input_tokens // self.block_tokens]
            after = following.get(request.session)
            if after is not None and after.block_ids[: len(whole)] == whole:
                length = min(request.input_tokens + request.output_tokens, after.input_tokens)
                whole = after.block_ids[: length // self.block_tokens]
            kept.append(whole)
            following[request.session] = request
        return kept[::-1]

    def faster(self, factor: float) -> "Trace":
        """Return the same requests, with all times divided by this; pauses shrink, too."""
        _check_factor(factor)
        return self._at([each.arrival_s / factor for each in self.requests])

    def denser(self, factor: float) -> "Trace":
        """Return the same sessions, so many times as many at once; their pauses stay."""
        _check_factor(factor)
        begins: dict[int, float] = {}
        for each in self.requests:
            begins.setdefault(each.session, each.arrival_s)
        shifts = {session: begin_s - begin_s / factor for session, begin_s in begins.items()}
        return self._at([each.arrival_s - shifts[each.session] for each in self.requests])

    def _at(self, times_s: Sequence[float]) -> "Trace":
        moved = [
            replace(each, arrival_s=time_s)
            for each, time_s in zip(self.requests, times_s, strict=True)
        ]
        moved.sort(key=lambda each: each.arrival_s)
        return Trace(tuple(moved), self.block_tokens)


def _check_factor(factor: float) -> None:
    if not factor > 0:
        raise ConfigError(f"a trace cannot have {factor} times its load")


def read_trace(path: Path, block_tokens: int = MOONCAKE_BLOCK_TOKENS) -> Trace:
    """Read a trace; blank lines are skipped, and fields that are not ours are ignored.

    Parameters
    ----------
    path : Path
        Lines of ``{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [...]}``, in
        any order. ``"session"``, an integer of ours, names the conversation; where a line has none,
        a prompt is taken for the next turn of the one whose whole prompt it begins with.
    block_tokens : int
        The format does not say; Mooncake's have 512.

    Raises
    ------
    ConfigError
        The file cannot be read, is empty, or a line is not of this format.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the trace cannot be read: {error}") from error
    rows = [
        _parse(line, block_tokens, f"{path}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows:
        raise ConfigError(f"{path}: the trace is empty")
    rows.sort(key=lambda row: row[0])
    return Trace(_with_sessions(rows, block_tokens), block_tokens)


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace that ``read_trace`` reads back, to the microsecond."""
    with path.open("w") as file:
        for each in trace.requests:
            row = {
                "timestamp": round(each.arrival_s * 1e3, 3),
                "input_length": each.input_tokens,
                "output_length": each.output_tokens,
                "hash_ids": each.block_ids,
                "session": each.session,
            }
            file.write(json.dumps(row) + "\n")


_Row = tuple[float, int, int, tuple[int, ...], int | None]


def _parse(line: str, block_tokens: int, where: str) -> _Row:
    try:
        row: dict[str, Any] = json.loads(line)
        ids = tuple(int(each) for each in row["hash_ids"])
        size, answer = int(row["input_length"]), int(row["output_length"])
        session = None if row.get("session") is None else int(row["session"])
        arrival_s = float(row["timestamp"]) / 1e3
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: not a request of a trace: {error!r}") from error
    wanted = -(-size // block_tokens)
    if size < 1 or answer < 1 or arrival_s < 0:
        raise ConfigError(f"{where}: {size} tokens in, {answer} out, at {arrival_s} s")
    if len(ids) != wanted:
        raise ConfigError(
            f"{where}: {size} tokens are {wanted} blocks of {block_tokens}, "
            f"but hash_ids has {len(ids)}"
        )
    return arrival_s, size, answer, ids, session


def _with_sessions(rows: Sequence[_Row], block_tokens: int) -> tuple[TraceRequest, ...]:
    """Give the rows that do not name their session one, apart from those that are named."""
    ends: dict[int, int] = {}  # the last full block of a session's last prompt, and the session
    named = [session for *_, session in rows if session is not None]
    fresh = max(named, default=-1) + 1
    found = []
    for arrival_s, size, answer, ids, given in rows:
        whole = ids[: size // block_tokens]
        session = given
        if session is None:
            session = next((ends.pop(each) for each in reversed(whole) if each in ends), None)
        if session is None:
            session, fresh = fresh, fresh + 1
        if whole:
            ends[whole[-1]] = session
        found.append(TraceRequest(arrival_s, size, answer, ids, session))
    return tuple(found)
