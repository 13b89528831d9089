"""Processes that use one session store together, and say what went wrong.

Started as a module it imports everything once and forks the workers. Each says its process id when
it begins and what it has done when it ends, one JSON object per line.
"""

import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from offload.errors import ConfigError, DiskFull, SessionNotFound
from offload.sessions.store import SessionStore
from tests.support.recipes import Reader, Recipe, reading, save

_NAMES = [f"s{i}" for i in range(10)]
_OPERATIONS = {
    "save": 30,
    "load": 30,
    "find_prefix": 15,
    "delete": 8,
    "rename": 6,
    "pin": 4,
    "list": 4,
    "reopen": 2,
    "verify": 1,
}


def recipe_of(seed: int) -> Recipe:
    """Return the only recipe with a seed, so that a session says what must be in it."""
    rng = random.Random(seed)
    return Recipe(
        seed=seed,
        num_chunks=rng.randint(1, 8),
        family=rng.randint(0, 2),
        shared_chunks=rng.randint(0, 6),
        has_tokens=rng.random() < 0.8,
    )


class Worker:
    """Does what is drawn from a seed to a store, and verifies whatever it reads.

    Parameters
    ----------
    root : Path
    seed : int
    reader : Reader
    """

    def __init__(self, root: Path, seed: int, reader: Reader) -> None:
        self._store = SessionStore(root, durability="none")
        self._rng = random.Random(seed)
        self._reader = reader
        self.counts = Counter[str]()
        self.slowest_s = 0.0

    def run(self, until: float) -> None:
        """Work until a moment of ``time.monotonic``, then close the store."""
        names, weights = list(_OPERATIONS), list(_OPERATIONS.values())
        while time.monotonic() < until:
            [what] = self._rng.choices(names, weights)
            started = time.monotonic()
            try:
                getattr(self, f"_{what}")(self._rng.choice(_NAMES))
                self.counts[what] += 1
            except (SessionNotFound, DiskFull) as error:
                self.counts[f"{what}: {type(error).__name__}"] += 1
            except ConfigError as error:
                # Somebody has it open, or has taken the name.
                if not any(text in str(error) for text in ("is open in", "there is a session")):
                    raise
                self.counts[f"{what}: refused"] += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        self._store.close()

    def _save(self, name: str) -> None:
        save(self._store, name, recipe_of(self._rng.getrandbits(40)))

    def _load(self, name: str) -> None:
        file, held = self._store.open(name)
        try:
            expected = recipe_of(int(file.state["seed"])).payloads
            assert self._reader.payloads(held) == expected, f"wrong bytes in {name}"
        finally:
            held.release()

    def _find_prefix(self, _: str) -> None:
        recipe = replace(recipe_of(self._rng.getrandbits(40)), has_tokens=True)
        self.counts["chunks found"] += self._reader.check_prefix(self._store, recipe)

    def _delete(self, name: str) -> None:
        self._store.delete(name)

    def _rename(self, name: str) -> None:
        self._store.rename(name, self._rng.choice(_NAMES))

    def _pin(self, name: str) -> None:
        self._store.pin(name, self._rng.random() < 0.3)

    def _list(self, _: str) -> None:
        self._store.list()
        self._store.usage()

    def _verify(self, name: str) -> None:
        report = self._store.verify(name)
        assert report.is_clean, report

    def _reopen(self, _: str) -> None:
        self._store.close()
        self._store = SessionStore(self._store.path, durability="none")


def _tell(event: dict[str, Any]) -> None:
    os.write(sys.stdout.fileno(), json.dumps(event).encode() + b"\n")


def _work(root: Path, seed: int, until: float) -> None:
    _tell({"pid": os.getpid()})
    try:
        with reading(root.with_name(f"reader-{seed}")) as reader:
            worker = Worker(root, seed, reader)
            worker.run(until)
        _tell({"counts": dict(worker.counts), "slowest_s": worker.slowest_s})
    except BaseException:
        _tell({"error": traceback.format_exc()[-3000:]})


def main(root: str, num_workers: str, seconds: str, seed: str) -> None:
    """Fork workers and wait for them."""
    torch.set_num_threads(1)
    until = time.monotonic() + float(seconds)
    children = []
    for number in range(int(num_workers)):
        children.append(os.fork())
        if children[-1] == 0:
            _work(Path(root), 1000 * int(seed) + number, until)
            os._exit(0)
    # Until all have ended, none is reaped: the process ids stay theirs.
    for child in children:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)


if __name__ == "__main__":
    main(*sys.argv[1:])
