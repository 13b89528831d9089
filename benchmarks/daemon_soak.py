"""Mixed sessions against a real ``offload serve``, and what it holds meanwhile.

    python -m benchmarks.daemon_soak [--minutes 30] [--clients 8] [--sessions 24] [--json FILE]
        [--plot FILE]

Clients take turns in sessions of theirs that grow, are forked, evicted, saved, explained and
deleted; hang up amid of answers; and send garbage. Every so often an answer is asked for again
where nothing can be reused: it has to be the same. Memory, descriptors and threads of the daemon
are read every two seconds, and the tiers against their capacities.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from offload.bench.provenance import read_provenance

_MIB = 1 << 20
_CAPACITY = {"device": 24 * _MIB, "host": 48 * _MIB, "disk": 512 * _MIB}
_MOST_CHARACTERS = 6000
"""A session longer than that is deleted, and begins anew."""

_REFUSED = {409, 429, 503}
"""Statuses that tell a client to come again."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the daemon held at one moment."""

    at_s: float
    rss_bytes: int
    num_descriptors: int
    num_threads: int


@dataclass(slots=True)
class Tally:
    """What the clients have seen, all of them together."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def blame(self, what: str) -> None:
        with self.lock:
            self.wrong.append(what)


class Visitor:
    """One client with sessions of its own, which only it uses.

    Parameters
    ----------
    number : int
        Seeds what it does.
    client : httpx.Client
    num_sessions : int
    tally : Tally
    """

    def __init__(self, number: int, client: httpx.Client, num_sessions: int, tally: Tally) -> None:
        self._random = random.Random(number)
        self._client = client
        self._tally = tally
        self._texts = {f"soak-{number}-{i}": "" for i in range(num_sessions)}

    def act(self) -> None:
        """Do one thing."""
        weights = {self._turn: 10, self._hang_up: 2, self._manage: 3, self._garbage: 1}
        [action] = self._random.choices(list(weights), weights=list(weights.values()))
        action(self._random.choice(list(self._texts)))

    def _turn(self, name: str) -> None:
        """Add to a session, and have it go on; sometimes check the answer without any reuse."""
        prompt = self._texts[name] + self._sentence()
        body = self._body(prompt, self._random.choice([1, 8, 24]))
        reply = self._complete(body, {"X-Session-ID": name})
        if reply is None:
            return
        answer = reply["choices"][0]["text"]
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        self._tally.count("turns that reused" if cached else "turns that reused nothing")
        if self._random.random() < 0.05:
            again = self._complete(body | {"cache_salt": f"{name}-{self._random.random()}"}, {})
            if again is not None:
                self._tally.count("answers checked")
                if again["choices"][0]["text"] != answer:
                    self._tally.blame(f"{name}: another answer at {len(prompt)} characters")
        self._texts[name] = prompt + answer
        if len(self._texts[name]) > _MOST_CHARACTERS:
            self._request("DELETE", f"/v1/sessions/{name}", {204, 404})
            self._texts[name] = ""

    def _hang_up(self, name: str) -> None:
        """Leave amid of an answer. What of it was kept is matched by tokens, or not."""
        body = self._body(self._texts[name] + self._sentence(), 64) | {"stream": True}
        headers = {"X-Session-ID": name}
        with self._client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
            if self._is_fine(reply, {200}):
                for _ in zip(range(self._random.randint(1, 12)), reply.iter_lines(), strict=False):
                    pass
        self._tally.count("hung up")

    def _manage(self, name: str) -> None:
        path, known = f"/v1/sessions/{name}", {200, 204, 404}
        action = self._random.choice(["fork", "evict", "persist", "prefetch", "get", "pin"])
        if action == "fork":
            copy = f"{name}-copy"
            self._request("DELETE", f"/v1/sessions/{copy}", known)
            self._request("POST", f"{path}/fork", known, {"name": copy})
            self._request("DELETE", f"/v1/sessions/{copy}", known)
        elif action == "evict":
            to = self._random.choice(["host", "disk"])
            self._request("POST", f"{path}/evict", known, {"to": to})
        elif action == "pin":
            self._request("PATCH", path, known, {"pin": True})
            self._request("PATCH", path, known, {"pin": False})
        elif action == "get":
            self._request("GET", path, known)
        else:
            self._request("POST", f"{path}/{action}", known)

    def _garbage(self, name: str) -> None:
        reply = self._client.post("/v1/completions", content=b'{"prompt": ' + name.encode())
        self._is_fine(reply, {400, 422})
        self._tally.count("garbage")

    def _complete(self, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any] | None:
        reply = self._client.post("/v1/completions", json=body, headers=headers)
        if not self._is_fine(reply, {200}):
            return None
        found: dict[str, Any] = reply.json()
        return found

    def _request(
        self, method: str, path: str, known: set[int], body: dict[str, Any] | None = None
    ) -> None:
        reply = self._client.request(method, path, json=body)
        self._is_fine(reply, known)
        self._tally.count(
            f"{method} {path.rpartition('/')[2] if path.count('/') > 3 else 'session'}"
        )

    def _is_fine(self, reply: httpx.Response, expected: set[int]) -> bool:
        status = reply.status_code
        if status not in expected | _REFUSED:
            said = reply.read()[:200].decode(errors="replace")
            asked = f"{reply.request.method} {reply.request.url.path}"
            self._tally.blame(f"{asked}: {status}, expected {sorted(expected)}: {said}")
        if status in _REFUSED and status not in expected:
            self._tally.count(f"told to come again ({status})")
        return status in expected

    def _body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}

    def _sentence(self) -> str:
        words = ["harbour", "lamp", "seven", "of", "the", "river", "stone", "and", "quiet"]
        return " ".join(self._random.choices(words, k=self._random.randint(8, 60))) + ". "


class Daemon:
    """A daemon of its own in a process of its own, on a free port of loopback."""

    def __init__(self, folder: Path) -> None:
        sizes = [f"tiers.{name}.size={size}" for name, size in _CAPACITY.items()]
        settings = ["tiers.disk.min_free=0", "sessions.idle_to_host=2s", "sessions.idle_to_disk=6s"]
        settings += ["sessions.persist_interval=10s", "sessions.disk_quota=256MiB", *sizes]
        ready = folder / "ready.json"
        options = [option for each in settings for option in ("--set", each)]
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "offload.cli", "serve", "--port", "0"),
                *("--data-path", str(folder / "data"), "--ready-file", str(ready)),
                *("--set", "model.threads=1", *options),
            ],
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 120
        while not ready.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise SystemExit(
                    f"the daemon did not start: {(folder / 'log').read_text()[-2000:]}"
                )
            time.sleep(0.1)
        self.address = json.loads(ready.read_text())["address"]

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def sample(self, began_s: float) -> Sample:
        process = Path(f"/proc/{self._process.pid}")
        status = dict(
            line.split(":", 1) for line in (process / "status").read_text().splitlines() if line
        )
        return Sample(
            time.monotonic() - began_s,
            int(status["VmRSS"].split()[0]) * 1024,
            len(list((process / "fd").iterdir())),
            int(status["Threads"]),
        )

    def close(self) -> int:
        """End the process as a service manager would; return its status."""
        if self.is_alive:
            self._process.terminate()
        status = self._process.wait(120)
        self._log.close()
        return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw memory over time to this file")
    options = parser.parse_args(arguments)
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder))
        try:
            samples, peaks = _soak(daemon, tally, options)
        finally:
            status = daemon.close()
    if status:
        tally.blame(f"the daemon ended with status {status}")
    found = _figures(samples, peaks, tally, options)
    print(json.dumps(found, indent=1))
    if options.json is not None:
        made_by = {"provenance": asdict(read_provenance())}
        samples_found = {"samples": [asdict(each) for each in samples]}
        options.json.write_text(json.dumps({**made_by, **found, **samples_found}) + "\n")
    if options.plot is not None:
        _draw(samples, options.plot)
    return int(bool(tally.wrong))


def _soak(
    daemon: Daemon, tally: Tally, options: argparse.Namespace
) -> tuple[list[Sample], dict[str, int]]:
    began_s, samples, peaks = time.monotonic(), list[Sample](), Counter[str]()
    end_s, is_over = began_s + 60 * options.minutes, threading.Event()
    threads = [
        threading.Thread(target=_visit, args=(number, daemon, tally, options, is_over))
        for number in range(options.clients)
    ]
    for thread in threads:
        thread.start()
    try:
        with (
            httpx.Client(base_url=daemon.address, timeout=60) as client,
            tqdm(total=round(60 * options.minutes), unit="s", disable=None) as bar,
        ):
            while time.monotonic() < end_s and daemon.is_alive:
                is_over.wait(2.0)
                samples.append(daemon.sample(began_s))
                bar.update(round(samples[-1].at_s) - bar.n)
                _look(client, tally, peaks)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    if not daemon.is_alive:
        tally.blame("the daemon died")
    return samples, dict(peaks)


def _visit(
    number: int, daemon: Daemon, tally: Tally, options: argparse.Namespace, over: threading.Event
) -> None:
    share = max(1, options.sessions // options.clients)
    with httpx.Client(base_url=daemon.address, timeout=120) as client:
        visitor = Visitor(number, client, share, tally)
        while not over.is_set():
            try:
                visitor.act()
            except httpx.HTTPError as error:
                tally.blame(f"{type(error).__name__}: {error}")
                if not daemon.is_alive:
                    return


def _look(client: httpx.Client, tally: Tally, peaks: Counter[str]) -> None:
    """Compare the tiers with their capacities."""
    for tier in client.get("/admin/api/state").json()["tiers"]:
        name, capacity = tier["name"], tier["capacity_bytes"]
        peaks[name] = max(peaks[name], tier["peak_bytes"])
        if max(tier["used_bytes"], tier["peak_bytes"]) > capacity:
            tally.blame(f"{name} holds {tier['peak_bytes']} of {capacity} bytes")


def _figures(
    samples: Sequence[Sample], peaks: dict[str, int], tally: Tally, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the growth between the second fifth of the time and the last, and what was counted."""
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth] or samples, samples[-fifth:]

    def both(name: str) -> list[float]:
        return [statistics.median(getattr(each, name) for each in part) for part in (early, late)]

    return {
        "minutes": options.minutes,
        "clients": options.clients,
        "rss_mib": [round(value / _MIB, 1) for value in both("rss_bytes")],
        "descriptors": both("num_descriptors"),
        "threads": both("num_threads"),
        "capacity_bytes": _CAPACITY,
        "peak_bytes": peaks,
        "counts": dict(sorted(tally.counts.items())),
        "num_wrong": len(tally.wrong),
        "wrong": tally.wrong[:20],
    }


def _draw(samples: Sequence[Sample], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left = figure.subplots()
    minutes = [each.at_s / 60 for each in samples]
    left.plot(minutes, [each.rss_bytes / _MIB for each in samples], label="resident MiB")
    right = left.twinx()
    right.plot(minutes, [each.num_descriptors for each in samples], "C1", label="descriptors")
    right.plot(minutes, [each.num_threads for each in samples], "C2", label="threads")
    left.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    right.set(ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    raise SystemExit(main())
