"""Sessions that daemons share: what a turn costs, and what a session costs that moves.

The shipped recall model reads a document in a session, and is asked about it turn by turn: at a
daemon that shares nothing, at one that shares on a folder, and then at another that has to fetch
the session first, each time with a data path that is new to it.

    python -m benchmarks.sharing [--tokens 4096] [--turns 5] [--directory DIR] [--url URL]
        [--json FILE]
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from offload.daemon.engine import DaemonEngine
from offload.daemon.engine_settings import EngineSettings
from offload.daemon.requests import GenerationRequest, Sampling, Started, Token
from offload.daemon.served_model import ServedModel, load_served_model
from offload.daemon.sharing.sharing_settings import SharingSettings
from offload.recall_data import build_document

_CAPACITY = {"gpu": "1GiB", "cpu": "1GiB", "disk": "4GiB"}
_SESSION = "chat"
_ANSWER_TOKENS = 16
_QUESTION = "What did the page say, again?"
_PUBLISH_S = 60.0


@dataclass(frozen=True)
class Turn:
    """One request. ``publish_s`` is from its end until the session is given back."""

    first_token_s: float
    fetch_s: float
    publish_s: float
    num_cached: int
    num_remote: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """Medians over the turns, in milliseconds, but for the prefill and the totals."""

    num_tokens: int
    prefill_s: float
    alone_ms: float
    shared_ms: float
    publish_ms: float
    moved_ms: float
    fetch_ms: float
    fetched_mib: float
    published_mib: float
    is_same: bool


async def take_turn(engine: DaemonEngine, ids: Sequence[int]) -> Turn:
    sampling = Sampling(temperature=0.0, max_tokens=_ANSWER_TOKENS, ignore_eos=True)
    asked = GenerationRequest("r", "ann", tuple(ids), sampling, session=_SESSION)
    began, first_s, started, tokens = time.perf_counter(), 0.0, None, []
    async for event in engine.generate(asked):
        if isinstance(event, Started):
            started = event
        elif isinstance(event, Token):
            first_s = first_s or time.perf_counter() - began
            tokens.append(event.token_id)
    ended = time.perf_counter()
    if engine._sharing is not None:
        await asyncio.to_thread(engine._sharing.drain, _PUBLISH_S)
    publish_s = time.perf_counter() - ended
    assert started is not None
    cached = started.cached
    restore_s = started.restore_s if cached.remote else 0.0
    return Turn(first_s, restore_s, publish_s, cached.total, cached.remote, tuple(tokens))


async def converse(
    engines: Sequence[DaemonEngine], model: ServedModel, document: list[int], num_turns: int
) -> list[Turn]:
    """Read a document at the first engine, and ask on, taking the engines in turn."""
    ids, turns = list(document), []
    for number in range(num_turns + 1):
        turns.append(await take_turn(engines[number % len(engines)], ids))
        ids += [*turns[-1].tokens, *model.tokenizer.encode(_QUESTION)]
    return turns


def measure(model: ServedModel, folder: Path, url: str, options: argparse.Namespace) -> Result:
    document = list(build_document(options.tokens, 4, 0).token_ids)

    def run(case: str, num_engines: int, prefix: str | None) -> tuple[list[Turn], float, float]:
        sharing = None
        if prefix is not None:
            sharing = SharingSettings(f"{url}/{prefix}", folder / f"secret-{prefix}")
        engines = [
            DaemonEngine(
                model,
                EngineSettings(
                    folder / f"{case}-{number}",
                    capacity=_CAPACITY,
                    min_free_bytes=0,
                    sharing=sharing,
                ),
            )
            for number in range(num_engines)
        ]
        try:
            for engine in engines:
                engine.start()
            turns = asyncio.run(converse(engines, model, document, options.turns))
            states = [engine.snapshot().sharing for engine in engines]
            up = sum(state.published_bytes for state in states if state is not None)
            down = sum(state.fetched_bytes for state in states if state is not None)
            return turns, up, down
        finally:
            for engine in engines:
                engine.close()

    alone, _, _ = run("alone", 1, None)
    stays, up, _ = run("stays", 1, "stays")
    moves, _, down = run("moves", 2, "moves")
    return Result(
        num_tokens=len(document),
        prefill_s=min(case[0].first_token_s for case in (alone, stays, moves)),
        alone_ms=_median(turn.first_token_s for turn in alone[1:]),
        shared_ms=_median(turn.first_token_s for turn in stays[1:]),
        publish_ms=_median(turn.publish_s for turn in stays[1:]),
        moved_ms=1e3 * moves[1].first_token_s,
        fetch_ms=1e3 * moves[1].fetch_s,
        fetched_mib=down / 2**20,
        published_mib=up / 2**20,
        is_same=len({tuple(turn.tokens for turn in case) for case in (alone, stays, moves)}) == 1,
    )


def _median(seconds: Iterable[float]) -> float:
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--url", help="an object store; a folder by default")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args(sys.argv[1:])
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = Path(name)
        (folder / "bucket").mkdir()
        url = options.url or (folder / "bucket").as_uri()
        found = measure(load_served_model(), folder, url, options)
    print(
        f"{found.num_tokens} tokens, read in {found.prefill_s:.2f} s. First token of a later turn: "
        f"{found.alone_ms:.0f} ms without sharing, {found.shared_ms:.0f} ms with it; published "
        f"{found.publish_ms:.0f} ms after its end. At another daemon: {found.moved_ms:.0f} ms, of "
        f"which {found.fetch_ms:.0f} ms to fetch. {found.published_mib:.1f} MiB up, "
        f"{found.fetched_mib:.1f} MiB down in all; same tokens: {found.is_same}"
    )
    if options.json is not None:
        machine = {"machine": platform.machine(), "num_cpus": os.cpu_count()}
        options.json.write_text(json.dumps({**machine, **asdict(found)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
