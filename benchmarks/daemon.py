"""What the daemon's engine does: sessions side by side, beside a long prompt, after a restart.

    python -m benchmarks.daemon [--sessions 8] [--context 1024] [--tokens 128] [--long 32768]
        [--json FILE]

Three figures on the recall model, or on ``--model``: tokens per second of one session and of
several at once; time between the tokens of an answer while a long prompt is read beside it; time to
the first token of that prompt's next turn, after a restart, against reading it again.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from offload.bench.provenance import read_provenance
from offload.daemon.engine import DaemonEngine
from offload.daemon.engine_settings import EngineSettings
from offload.daemon.requests import GenerationRequest, Sampling, Started, Token
from offload.daemon.served_model import ServedModel, load_served_model

_TELL = Console(stderr=True)


@dataclass(slots=True)
class Heard:
    """One answer: when it began, and when each token came."""

    asked_s: float
    started: Started | None = None
    token_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        return self.token_s[0] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        return [
            after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the three measurements, and print or write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="recall")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024, help="tokens of each session's prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--long", type=int, default=32768, help="tokens of the long prompt")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = load_served_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "load_average": os.getloadavg()[0],
            "throughput": asyncio.run(_throughput(model, Path(folder) / "many", options)),
            "beside_prefill": asyncio.run(_beside_prefill(model, Path(folder) / "long", options)),
            "resume": asyncio.run(_resume(model, Path(folder) / "long", options)),
        }
    _show(found)
    if options.json is not None:
        result = {"options": vars(options), "provenance": asdict(read_provenance()), **found}
        options.json.write_text(json.dumps(result, default=str, indent=1))


async def _throughput(
    model: ServedModel, folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Return tokens per second of one session, and of several at once; the best of some rounds."""
    engine = DaemonEngine(model, _settings(folder))
    engine.start()
    rates: dict[int, list[float]] = {1: [], options.sessions: []}
    try:
        for turn in range(options.repeat):
            for count in rates:
                _tell(f"round {turn + 1} of {options.repeat}: {count} sessions")
                heard = await asyncio.gather(
                    *(
                        _ask(engine, _ids(options.context, seed), f"s{seed}", options.tokens)
                        for seed in range(count)
                    )
                )
                # From when all of them answer to when the first has ended.
                begin = max(each.token_s[0] for each in heard)
                end = min(each.token_s[-1] for each in heard)
                number = sum(begin < at <= end for each in heard for at in each.token_s)
                rates[count].append(number / (end - begin))
    finally:
        await engine.drain(1.0)
        engine.close()
    one, many = max(rates[1]), max(rates[options.sessions])
    return {"one_tokens_per_s": one, "many_tokens_per_s": many, "ratio": many / one}


async def _beside_prefill(
    model: ServedModel, folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Return the times between an answer's tokens alone, and while a long prompt is read."""
    engine = DaemonEngine(model, _settings(folder))
    engine.start()
    _tell(f"an answer beside a prompt of {options.long} tokens")
    try:
        alone = await _ask(engine, _ids(options.context, 1), "alone", options.tokens)
        talking = asyncio.create_task(_ask(engine, _ids(options.context, 2), "talker", 100_000))
        reader = await _ask(engine, _ids(options.long, 3), "long", 16)
        talking.cancel()
        heard = await talking
        during = [
            after - before
            for before, after in zip(heard.token_s, heard.token_s[1:], strict=False)
            if reader.asked_s <= before and after <= reader.token_s[0]
        ]
        saving = time.monotonic()
        await engine.sessions.persist("bench", "long")
        saved_s = time.monotonic() - saving
    finally:
        await engine.drain(1.0)
        engine.close()
    (folder / "answer.json").write_text(json.dumps(reader.tokens))
    return {
        "alone_p50_ms": 1e3 * statistics.median(alone.gaps_s),
        "p50_ms": 1e3 * statistics.median(during),
        "p95_ms": 1e3 * _quantile(during, 0.95),
        "max_ms": 1e3 * max(during),
        "tokens": len(during),
        "prefill_s": reader.first_s,
        "last_save_s": saved_s,
    }


async def _resume(
    model: ServedModel, folder: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Return the time to the first token of the next turn after a restart, and without sessions."""
    answer = json.loads((folder / "answer.json").read_text())
    whole = (*_ids(options.long, 3), *answer, *_ids(16, 4))
    engine = DaemonEngine(model, _settings(folder))
    engine.start()
    _tell("the next turn after a restart")
    try:
        resumed = await _ask(engine, whole, "long", 16)
        assert resumed.started is not None
        _tell("the same without a session")
        cold = await _ask(engine, whole, "cold", 16, tenant="nobody")
    finally:
        await engine.drain(1.0)
        engine.close()
    return {
        "cached_tokens": resumed.started.cached.disk,
        "prompt_tokens": len(whole),
        "resumed_first_token_s": resumed.first_s,
        "cold_first_token_s": cold.first_s,
        "share": resumed.first_s / cold.first_s,
        "is_same_answer": float(resumed.tokens == cold.tokens),
    }


async def _ask(
    engine: DaemonEngine, ids: tuple[int, ...], session: str, count: int, tenant: str = "bench"
) -> Heard:
    """Return what was heard; also where the task is cancelled meanwhile."""
    sampling = Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
    heard = Heard(time.monotonic())
    events = engine.generate(GenerationRequest("bench", tenant, ids, sampling, session=session))
    try:
        async for event in events:
            if isinstance(event, Started):
                heard.started = event
            elif isinstance(event, Token):
                heard.token_s.append(time.monotonic())
                heard.tokens.append(event.token_id)
    except asyncio.CancelledError:
        await events.aclose()
    return heard


def _settings(folder: Path) -> EngineSettings:
    capacity = {"gpu": "1GiB", "cpu": "1GiB", "disk": "4GiB"}
    return EngineSettings(folder, capacity=capacity, min_free_bytes=0)


def _ids(count: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(32, 127, (count,), generator=generator).tolist())


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _show(found: dict[str, Any]) -> None:
    console = Console()
    for name, values in found.items():
        if isinstance(values, dict):
            console.print(name)
            for key, value in values.items():
                console.print(f"  {key:24} {value:12.4g}")
        else:
            console.print(f"{name:26} {values:12.4g}")


def _tell(what: str) -> None:
    if sys.stderr.isatty():
        _TELL.print(what)
    else:
        print(what, file=sys.stderr)


if __name__ == "__main__":
    main()
